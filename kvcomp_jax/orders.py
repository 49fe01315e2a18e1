"""In which order the tokens of a unit are stored: attention does not care, and alike neighbours pack tighter."""

import abc
import dataclasses
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.codecs import AcrossHeads, Codec, IntegerCodec, Packs


class Order(abc.ABC):
    """A static rule, part of a `Rung`; keys, values and positions of a unit move together."""

    @abc.abstractmethod
    def arrange(self, k_codec: Codec, v_codec: Codec, k: jax.Array, v: jax.Array) -> jax.Array:
        """Return which token of k, v [B, K, S, D] each slot takes, i32[B, K, S]: a permutation within each unit."""

    @abc.abstractmethod
    def check(self, k_codec: Codec, v_codec: Codec) -> None:
        """Raise ValueError if codecs do not suit."""


@dataclasses.dataclass(frozen=True)
class Alike(Order):
    """Put tokens with similar codes into the same pack, in each unit and KV head.

    "greedy" starts a pack with the token most similar (cosine) to the mean of those that remain, and adds the one that
    widens it least; "median" sorts by the median of a token's value codes, descending. Where the packs do not become
    narrower in sum, the order of time stays. Greedy takes about S / pack times as many operations as packing.
    Source: PackKV, arXiv:2512.24449; one order for all heads, as there, where the codecs join them, else one a head.
    """

    kind: Literal["greedy", "median"] = "greedy"

    def __post_init__(self) -> None:
        if self.kind not in ("greedy", "median"):
            raise ValueError(f"kind={self.kind!r} must be 'greedy' or 'median'.")

    def check(self, k_codec: Codec, v_codec: Codec) -> None:
        """Packs of the same tokens on both sides."""
        k, v = _packs(k_codec), _packs(v_codec)
        if not isinstance(k, Packs) or not isinstance(v, Packs) or k_codec.joins_heads != v_codec.joins_heads:
            raise ValueError(
                f"{self} needs keys and values in Packs, both of single heads or AcrossHeads, "
                f"got {k_codec} and {v_codec}."
            )
        if (k.block, k.pack) != (v.block, v.pack):
            raise ValueError(f"{self} needs the same block and pack of keys and values, got {k_codec} and {v_codec}.")

    def arrange(self, k_codec: Codec, v_codec: Codec, k: jax.Array, v: jax.Array) -> jax.Array:
        """See `Order`."""
        if isinstance(k_codec, AcrossHeads) and isinstance(v_codec, AcrossHeads):
            joined = k_codec.join(k), v_codec.join(v)
            return jnp.broadcast_to(self.arrange(k_codec.inner, v_codec.inner, *joined), k.shape[:-1])
        packs = cast(Packs, k_codec)
        codes = [
            cast(IntegerCodec, cast(Packs, codec).inner).quantise(x, 1.0)[0]
            for codec, x in ((k_codec, k), (v_codec, v))
        ]
        size, pack = packs.block, packs.pack
        *b, num_tokens, _ = k.shape
        units = [x.astype(jnp.int32).reshape(-1, size, x.shape[-1]) for x in codes]  # [n, P, D]
        both, values = jnp.concatenate(units, -1), units[1]

        def one(unit: tuple[jax.Array, jax.Array]) -> jax.Array:
            found = _greedy(unit[0], pack) if self.kind == "greedy" else _by_median(unit[1])
            same = jnp.arange(size, dtype=jnp.int32)
            return jnp.where(_planes(unit[0][found], pack) < _planes(unit[0], pack), found, same)

        order = lax.map(one, (both, values), batch_size=64)
        first = jnp.arange(num_tokens // size, dtype=jnp.int32)[:, None] * size
        return (order.reshape(*b, num_tokens // size, size) + first.reshape(*(1,) * len(b), -1, 1)).reshape(
            *b, num_tokens
        )


def _packs(codec: Codec) -> Codec:
    """What stores the rows, of one head or of all."""
    return codec.inner if isinstance(codec, AcrossHeads) else codec


def permute(rows: jax.Array, order: jax.Array) -> jax.Array:
    """Take tokens `order` i32[B, K, S] of rows [B, K, S, ...]."""
    return jnp.take_along_axis(rows, order.reshape(*order.shape, *(1,) * (rows.ndim - order.ndim)), 2)


def _bits(spread: jax.Array) -> jax.Array:
    return 32 - lax.clz(spread)


def _planes(codes: jax.Array, pack: int) -> jax.Array:
    """Bits a token that the packs of codes i32[P, F] take, summed."""
    packs = codes.reshape(-1, pack, codes.shape[-1])
    return _bits(packs.max(1) - packs.min(1)).sum()


def _by_median(values: jax.Array) -> jax.Array:
    return jnp.argsort(-jnp.median(values, -1), stable=True).astype(jnp.int32)


def _greedy(codes: jax.Array, pack: int) -> jax.Array:
    """Order i32[P] of the tokens of codes i32[P, F]."""
    size = codes.shape[0]
    norm = jnp.maximum(jnp.linalg.norm(codes.astype(jnp.float32), axis=-1), 1e-6)

    def add(i: jax.Array, state: tuple) -> tuple:
        order, left, low, high = state
        mean = jnp.round((codes * left[:, None]).sum(0) / jnp.maximum(left.sum(), 1))
        alike = codes.astype(jnp.float32) @ mean / norm  # the mean's own norm changes no order
        wider = _bits(jnp.maximum(high[None], codes) - jnp.minimum(low[None], codes)).sum(-1)
        starts = i % pack == 0
        cost = jnp.where(left, jnp.where(starts, -alike, wider.astype(jnp.float32)), jnp.inf)
        chosen = jnp.argmin(cost).astype(jnp.int32)
        token = codes[chosen]
        low = jnp.where(starts, token, jnp.minimum(low, token))
        high = jnp.where(starts, token, jnp.maximum(high, token))
        return order.at[i].set(chosen), left.at[chosen].set(False), low, high

    start = jnp.zeros(size, jnp.int32), jnp.ones(size, bool), codes[0], codes[0]
    return lax.fori_loop(0, size, add, start)[0]
