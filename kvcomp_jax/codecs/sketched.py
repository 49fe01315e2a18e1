"""What another codec leaves over, as one bit a value: the signs of random projections, and a norm."""

import dataclasses
import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvcomp_jax.codecs.base import Codec, Encoded
from kvcomp_jax.codecs.contract import dot_scaled, mix_scaled
from kvcomp_jax.codecs.minifloat import saturated
from kvcomp_jax.types import pytree, static
from pallas_kernels.packing import pack, pack_unit, unpack


class Sketch(NamedTuple):
    """An encoding and a sketch of its residual r: x ~ inner + norm * sqrt(pi / 2) / D * signs @ S."""

    inner: Encoded
    codes: jax.Array  # u32[*b, S // 32, D], the signs of S @ r packed at 1 bit: 1 is positive
    norm: jax.Array  # [*b, S], of r


@pytree
class Sketched(Codec):
    """Add the signs of D random projections of the inner codec's residual, and its norm, to what it stores.

    Over random matrices S of independent normals, products with any fixed query are then right on average, whatever
    the inner codec shrinks; a single one varies by pi / (2 D) * |q|**2 |r|**2, pi / 2 times what leaving r out costs.
    One D x D matrix for all heads, made from `seed`, costs nothing in the cache. Queries are projected once.
    Source: QJL, Zandieh et al. 2024, arXiv:2406.03482, definition 3.1; on a residual in TurboQuant, Zandieh et al.
    2025, arXiv:2504.19874, algorithm 2.
    """

    inner: Codec
    seed: int = static(default=0)
    metadata_dtype: str = static(default="float16")

    @property
    def unit(self) -> int:
        """Tokens that share words, here or in the inner codec."""
        return math.lcm(self.inner.unit, pack_unit(1))

    @property
    def name(self) -> str:
        """Sketched(inner)."""
        return f"{type(self).__name__}({self.inner.name})"

    def encode(self, x: jax.Array, pos: jax.Array) -> Sketch:
        """Encode x [*b, S, D] and sketch what is left."""
        enc = self.inner.encode(x, pos)
        residual = x.astype(jnp.float32) - self.inner.decode(enc, pos)
        positive = jnp.matmul(residual, self._projections(x.shape[-1]).T, precision="highest") >= 0
        norm = saturated(jnp.sqrt(jnp.square(residual).sum(-1)), self.metadata_dtype)
        return Sketch(enc, pack(positive.astype(jnp.uint8), 1), norm)

    def decode(self, enc: Sketch, pos: jax.Array) -> jax.Array:
        """Return the inner rows and the estimate of their residuals, f32[*b, S, D]."""
        rows = jnp.matmul(_signs(enc), self._projections(enc.codes.shape[-1]), precision="highest")
        return self.inner.decode(enc.inner, pos) + rows * _scale(enc)[..., None]

    def dot(self, q: jax.Array, enc: Sketch, pos: jax.Array) -> jax.Array:
        """Project q, not the signs back."""
        projected = jnp.matmul(q.astype(jnp.float32), self._projections(q.shape[-1]).T, precision="highest")
        return self.inner.dot(q, enc.inner, pos) + dot_scaled(projected, _signs(enc), _scale(enc))

    def mix(self, p: jax.Array, enc: Sketch, pos: jax.Array) -> jax.Array:
        """Project the mixed signs back."""
        mixed = mix_scaled(p, _signs(enc), _scale(enc))
        projected = jnp.matmul(mixed, self._projections(enc.codes.shape[-1]), precision="highest")
        return self.inner.mix(p, enc.inner, pos) + projected

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """The inner codec's, a bit a value and the norms; `num_tokens` counts in whole units."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return self.inner.nbits(num_tokens, head_dim) + num_tokens * (head_dim + self._norm_bits)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """The inner codec's, and the norms."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return self.inner.metadata_bits(num_tokens, head_dim) + num_tokens * self._norm_bits

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if the inner codec cannot store such rows, or words do not divide a block."""
        self.inner.check(head_dim, block_size)
        super().check(head_dim, block_size)

    def bind(self, dtype: Any) -> "Sketched":
        """Bind the inner codec."""
        return dataclasses.replace(self, inner=self.inner.bind(dtype))

    def prepare(self, batch: int, num_kv_heads: int, head_dim: int) -> "Sketched":
        """Prepare the inner codec."""
        return dataclasses.replace(self, inner=self.inner.prepare(batch, num_kv_heads, head_dim))

    @property
    def fits(self) -> bool:
        """Whether the inner codec does."""
        return self.inner.fits

    def fit(self, x: jax.Array, live: jax.Array) -> "Sketched":
        """Fit the inner codec."""
        return dataclasses.replace(self, inner=self.inner.fit(x, live))

    @property
    def _norm_bits(self) -> int:
        return jnp.dtype(self.metadata_dtype).itemsize * 8

    def _projections(self, dim: int) -> jax.Array:
        return jnp.asarray(_normals(self.seed, dim))


def _signs(enc: Sketch) -> jax.Array:
    """+1 and -1, f32[*b, S, D]."""
    return unpack(enc.codes, 1).astype(jnp.float32) * 2 - 1


def _scale(enc: Sketch) -> jax.Array:
    """f32[*b, S]."""
    return enc.norm.astype(jnp.float32) * (math.sqrt(math.pi / 2) / enc.codes.shape[-1])


@lru_cache
def _normals(seed: int, dim: int) -> np.ndarray:
    """S f32[D, D]."""
    return np.random.default_rng(seed).standard_normal((dim, dim), np.float32)
