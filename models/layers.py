"""The pieces of a transformer: linear maps, norms, embeddings, attention, MLP."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

import kvcomp_jax as kvc
from models.config import ModelConfig
from models.integers import IntegerFormat, integer_product, packed_shape, round_rows, unpack_weight
from models.rope import rotate
from pallas_kernels.hadamard import hadamard_blocks

Cache = Any  # kvc.LayerCache | kvc.PromptCache | None
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply x [..., M] by weight [N, M] transposed, in x's dtype, accumulated and returned in float32.

    Weights keep the checkpoint's [out, in] orientation: for one token on CPU the product takes 20 ms a step of a
    135M-parameter model, against 27 ms with [in, out].
    """
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight.astype(x.dtype), contract, preferred_element_type=jnp.float32)


class Linear(nn.Module):
    """Affine map with weight [out, in], or with packed codes and a scale an output channel; see `integers`."""

    features: int
    use_bias: bool = False
    integers: IntegerFormat = IntegerFormat()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., M] -> [..., features]."""
        bits, ones = self.integers.activation_bits, (1,) * (x.ndim - 1)
        rows, row_scale = (x, None) if bits is None else round_rows(x, bits, self.integers.activation_clip)
        y = self._product(rows, x.dtype)
        y = (y if row_scale is None else y * row_scale).astype(x.dtype)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + bias.astype(x.dtype).reshape(*ones, -1)

    def _product(self, rows: jax.Array, dtype: Any) -> jax.Array:
        """Multiply floats or codes [..., M] by the weight, f32[..., features]."""
        bits = self.integers.weight_bits
        if bits is None:
            weight = self.param("weight", _init(), (self.features, rows.shape[-1]))
            return matmul(rows.astype(dtype), weight)
        shape = packed_shape(rows.shape[-1], self.features, bits)
        words = self.param("codes", lambda _: jnp.zeros(shape.shape, shape.dtype))
        scale = self.param("scale", lambda _: jnp.ones(self.features, jnp.float16))
        weight = unpack_weight(words, bits)
        if self.integers.activation_bits is None:
            y = jnp.matmul(rows, weight.astype(dtype), preferred_element_type=jnp.float32)
        else:
            y = integer_product(rows, weight)
        return y * scale.astype(jnp.float32).reshape(*(1,) * (rows.ndim - 1), -1)


def dense_weight(params: Any, integers: IntegerFormat) -> jax.Array:
    """The weight [N, M] of a `Linear` from its parameters, codes multiplied out."""
    if integers.weight_bits is None:
        return params["weight"]
    return (unpack_weight(params["codes"], integers.weight_bits) * params["scale"].astype(jnp.float32)[None]).T


class Norm(nn.Module):
    """RMS norm (optionally with 1 + weight) or layer norm, in float32."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., M] -> [..., M]."""
        start = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        weight = self.param("weight", start, (x.shape[-1],)).astype(jnp.float32)
        ones = (1,) * (x.ndim - 1)
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        y = y * (weight + (self.kind == "rms_plus_one")).reshape(*ones, -1)
        if self.kind == "layer":
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32).reshape(*ones, -1)
        return y.astype(x.dtype)


class Table(nn.Module):
    """Rows looked up by id, or multiplied as the output head."""

    rows: int
    features: int

    def setup(self) -> None:
        """Declare the table."""
        self.weight = self.param("weight", _init(), (self.rows, self.features))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """i32[B, T] -> [B, T, features]."""
        return self.weight[ids]

    def attend(self, x: jax.Array) -> jax.Array:
        """[..., features] -> f32[..., rows]."""
        return matmul(x, self.weight)


class Attention(nn.Module):
    """Projections, norms and rotations of q, k, v around one call to the cache."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array] | None,
        cache: Cache,
        length: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        """[B, T, M] -> [B, T, M] and the cache with these tokens in it."""
        c = self.config
        q = Linear(c.num_heads * c.head_dim, c.qkv_bias, c.integers, name="q_proj")(x)
        k = Linear(c.num_kv_heads * c.head_dim, c.qkv_bias, c.integers, name="k_proj")(x)
        v = Linear(c.num_kv_heads * c.head_dim, c.qkv_bias, c.integers, name="v_proj")(x)
        q, k, v = (y.reshape(*x.shape[:2], -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm:
            q, k = Norm(c.norm, c.norm_eps, name="q_norm")(q), Norm(c.norm, c.norm_eps, name="k_norm")(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        scale = {"sm_scale": c.sm_scale, "soft_cap": c.attn_soft_cap}
        if cache is None:
            out = kvc.causal_attention(q, k, v, **scale, sliding_window=c.sliding_windows[self.layer])
        else:
            norm = self._output_norm(v) if kvc.wants_output_norm(cache) else None
            out, cache = kvc.attend(cache, q, k, v, length, **scale, output_norm=norm)
        if c.rotate_heads:
            out = hadamard_blocks(out.swapaxes(-1, -2)).swapaxes(-1, -2)
        return Linear(c.model_dim, c.o_bias, c.integers, name="o_proj")(out.reshape(*x.shape[:2], -1)), cache

    def _output_norm(self, v: jax.Array) -> jax.Array:
        """Of each value, what the output projection can make of it: [B, T, K, D] -> f32[B, T, K]."""
        return kvc.output_norm(v, output_weight(self.variables["params"]["o_proj"], self.config))


def output_weight(params: Any, config: ModelConfig) -> jax.Array:
    """What a layer's attention outputs are multiplied by, [M, H * D], from the parameters of its output projection."""
    weight = dense_weight(params, config.integers)
    if not config.rotate_heads:
        return weight
    by_head = weight.reshape(weight.shape[0], config.num_heads, config.head_dim)
    return hadamard_blocks(by_head.swapaxes(-1, -2)).swapaxes(-1, -2).reshape(weight.shape)


class MLP(nn.Module):
    """Two maps with an activation between, gated or not."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, M] -> [B, T, M]."""
        c = self.config
        act = _ACTIVATIONS[c.activation]
        up = Linear(c.ffn_dim, c.mlp_bias, c.integers, name="up_proj")(x)
        h = act(Linear(c.ffn_dim, c.mlp_bias, c.integers, name="gate_proj")(x)) * up if c.gated_mlp else act(up)
        h = hadamard_blocks(h) if c.rotate_ffn else h
        return Linear(c.model_dim, c.mlp_bias, c.integers.down, name="down_proj")(h)


def _init() -> Any:
    return nn.initializers.normal(0.02)
