"""One decoder-only transformer for every family, by configuration."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

import kvcomp_jax as kvc
from models.config import ModelConfig
from models.layers import MLP, Attention, Cache, Norm, Table
from models.rope import RopeConfig, angles


class Block(nn.Module):
    """Attention and MLP, each with its norms and residual."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(self, x: jax.Array, rotation: Any, cache: Cache, length: jax.Array | None) -> tuple[jax.Array, Cache]:
        """[B, T, M] -> [B, T, M] and the cache."""
        c = self.config

        def norm(name: str) -> Norm:
            return Norm(c.norm, c.norm_eps, name=name)

        h, cache = Attention(c, self.layer, name="attn")(norm("input_norm")(x), rotation, cache, length)
        x = x + (norm("post_attn_norm")(h) if c.post_norms else h)
        h = MLP(c, name="mlp")(norm("mlp_norm")(x))
        return x + (norm("post_mlp_norm")(h) if c.post_norms else h), cache


class Transformer(nn.Module):
    """Tokens to logits, with or without caches.

    Layers are unrolled: on CPU a scan over stacked weights is three times slower.
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        caches: tuple[Cache, ...] | None = None,
        length: jax.Array | None = None,
        *,
        logits: Literal["all", "last", "none"] = "all",
        rope_len: jax.Array | None = None,
    ) -> tuple[jax.Array | None, tuple[Cache, ...] | None]:
        """Compute logits of `tokens` and put them into the caches.

        Args:
          tokens: i32[B, T], right padded.
          caches: One a layer, all `PromptCache` or all `LayerCache`; None attends within `tokens` alone.
          length: i32[B], real tokens of each row; None = T.
          logits: "all" [B, T, V], of those tokens that reach the last layer; "last" [B, V], of each row's last real
            token; "none".
          rope_len: i32[B], text length that dynamic and longrope frequencies go by, see `rope.frequencies`; by default
            that of the text up to the last of `tokens`. Chunks of one prompt should all get the length of the whole.

        Returns:
          float32 logits or None, and the caches.

        Raises:
          ValueError: If `caches` has not one entry a layer, or `logits` is none of the three.
        """
        c = self.config
        if caches is not None and len(caches) != c.num_layers:
            raise ValueError(f"got {len(caches)} caches for a model of {c.num_layers} layers.")
        if logits not in ("all", "last", "none"):
            raise ValueError(f"logits={logits!r} must be 'all', 'last' or 'none'.")
        pos = _positions(tokens, caches)
        embed = Table(c.vocab_size, c.model_dim, name="embed_tokens")
        x = embed(tokens).astype(self.dtype) * jnp.asarray(c.embed_scale, self.dtype)
        if c.positions == "learned":
            table = Table(c.max_positions + c.position_offset, c.model_dim, name="embed_positions")
            x = x + table(pos + c.position_offset).astype(self.dtype)
        rotations = self._rotations(pos, rope_len if rope_len is not None else _text_len(pos, length))
        out = []
        for i in range(c.num_layers):
            rotation = rotations.get(c.ropes[i]) if c.ropes else None
            x, cache = Block(c, i, name=f"layers_{i}")(x, rotation, caches[i] if caches is not None else None, length)
            if caches is not None and i + 1 < c.num_layers and kvc.hands_on(cache, caches[i + 1]):
                index, length = kvc.hand_on(cache, caches[i + 1])
                x, pos = _take(x, index), _take(pos, index)
                rotations = {rope: tuple(_take(y, index) for y in turned) for rope, turned in rotations.items()}
                caches = tuple(dataclasses.replace(later, pos=pos) for later in caches)
            closes = caches is not None and isinstance(cache, kvc.PromptCache) and caches[i].in_one_chunk
            out.append(kvc.close_prompt(cache) if closes else cache)  # here, so that staged tokens outlive no layer
        x = Norm(c.norm, c.norm_eps, name="final_norm")(x)
        if logits == "last":
            x = x[:, -1] if length is None else _last_real(x, length)
        head = embed if c.tie_embeddings else Table(c.vocab_size, c.model_dim, name="lm_head")
        held = None if caches is None else tuple(out)
        if logits == "none":
            return None, held
        y = head.attend(x)
        if c.logit_soft_cap is not None:
            y = c.logit_soft_cap * jnp.tanh(y / c.logit_soft_cap)
        return y, held

    def _rotations(self, pos: jax.Array, seq_len: jax.Array) -> dict[RopeConfig, tuple[jax.Array, jax.Array]]:
        """Cosines and sines, once for each distinct rope."""
        return {rope: angles(rope, pos, seq_len) for rope in dict.fromkeys(self.config.ropes)}


def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Random float32 parameters, for tests and experiments."""
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))


def param_shapes(config: ModelConfig) -> Any:
    """The parameter tree as shapes, without making any."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def _positions(tokens: jax.Array, caches: tuple[Cache, ...] | None) -> jax.Array:
    if caches is not None:
        return kvc.positions(caches[0], tokens.shape[1])
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)


def _text_len(pos: jax.Array, length: jax.Array | None) -> jax.Array:
    return pos[:, -1] + 1 if length is None else pos[:, 0] + length


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Tokens index i32[B, n] of x [B, T, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)


def _last_real(x: jax.Array, length: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, jnp.maximum(length - 1, 0)[:, None, None], 1)[:, 0]
