"""Channels brought to units of a known scale and zero point each."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from kvcomp_jax.codecs.base import Encoded
from kvcomp_jax.codecs.wrapper import Wrapper
from kvcomp_jax.types import Constant, pytree, static
from pallas_kernels.codebook_decode.rows import CodebookRows


class Units(NamedTuple):
    """What a channel is measured in; x = inner * scale + zero_point."""

    scale: jax.Array  # f32[B, K, D]
    zero_point: jax.Array  # f32[B, K, D]


@pytree
class PerChannel(Wrapper):
    """Store (x - zero_point) / scale in the inner codec, with a scale and zero point for each head and channel.

    They are known beforehand, e.g. calibrated, and the same for all tokens, so that a token's code depends on it alone.
    Contractions fold them into q and out of the sums. An empty cache has them as arrays, one copy a row.
    """

    scale: Constant = static()  # f32[K, D], positive
    zero_point: Constant = static()  # f32[K, D]
    units: Units | None = None  # of a cache, see `prepare`

    def __post_init__(self) -> None:
        scale, zero_point = self.scale.value, self.zero_point.value
        if scale.shape != zero_point.shape or scale.ndim != 2:
            raise ValueError(f"scale {scale.shape} and zero_point {zero_point.shape} must both be [K, D].")
        if not (np.isfinite(scale).all() and (scale > 0).all() and np.isfinite(zero_point).all()):
            raise ValueError("scale must be positive, and scale and zero_point finite, in every channel.")

    def encode(self, x: jax.Array, pos: jax.Array) -> Encoded:
        """Encode x [*b, K, S, D] in units of its channels."""
        return self.inner.encode(self._measure(x), pos)

    def decode(self, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return inner * scale + zero_point, f32[*b, K, S, D]."""
        scale, zero_point = self._units(pos.ndim + 1)
        return self.inner.decode(enc, pos).astype(jnp.float32) * scale + zero_point

    def dot(self, q: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return (q scale) . inner + q . zero_point."""
        scale, zero_point = self._units(q.ndim)
        q = q.astype(jnp.float32)
        return self.inner.dot(q * scale, enc, pos) + (q * zero_point).sum(-1, keepdims=True)

    def mix(self, p: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return (p . inner) scale + sum(p) zero_point."""
        scale, zero_point = self._units(p.ndim)
        return self.inner.mix(p, enc, pos) * scale + p.sum(-1, keepdims=True) * zero_point

    def codebook_rows(self, enc: Encoded) -> CodebookRows | None:
        """The inner codec's with a scale and zero point a channel, in a cache, where they are arrays."""
        rows = self.inner.codebook_rows(enc)
        if rows is None or not rows.by_token or self.units is None:
            return None
        return rows._replace(channel_scale=self.units.scale, channel_zero_point=self.units.zero_point)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if there are scales for another head_dim, or the inner codec cannot store the rows."""
        if self.scale.value.shape[1] != head_dim:
            raise ValueError(f"scales of {self.scale.value.shape[1]} channels do not fit head_dim={head_dim}.")
        self.inner.check(head_dim, block_size)

    def prepare(self, batch: int, num_kv_heads: int, head_dim: int) -> Self:
        """Return this codec with its scales and zero points as arrays [B, K, D], and the inner one prepared."""
        shape = (batch, num_kv_heads, head_dim)
        if self.scale.value.shape != shape[1:]:
            raise ValueError(f"scales {self.scale.value.shape} do not fit heads and channels {shape[1:]}.")
        units = Units(*(jnp.tile(jnp.asarray(c.value, jnp.float32)[None], (batch, 1, 1)) for c in self._constants))
        return dataclasses.replace(self, units=units, inner=self.inner.prepare(batch, num_kv_heads, head_dim))

    def fit(self, x: jax.Array, live: jax.Array) -> Self:
        """Fit the inner codec to rows in its units."""
        return dataclasses.replace(self, inner=self.inner.fit(self._measure(x), live))

    @property
    def _constants(self) -> tuple[Constant, Constant]:
        return self.scale, self.zero_point

    def _measure(self, x: jax.Array) -> jax.Array:
        scale, zero_point = self._units(x.ndim)
        return (x.astype(jnp.float32) - zero_point) / scale

    def _units(self, ndim: int) -> tuple[jax.Array, jax.Array]:
        """Scale and zero point [..., K, 1, D] for rows of `ndim` dimensions."""
        held = self.units or [jnp.asarray(c.value, jnp.float32) for c in self._constants]
        scale, zero_point = (x.reshape(*(1,) * (ndim - 1 - x.ndim), *x.shape[:-1], 1, x.shape[-1]) for x in held)
        return scale, zero_point
