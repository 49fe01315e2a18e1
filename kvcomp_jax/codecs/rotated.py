"""Rows turned by an orthonormal Hadamard matrix before another codec stores them."""

import dataclasses
from functools import lru_cache
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from kvcomp_jax.codecs.affine import Affine
from kvcomp_jax.codecs.base import Codec, Encoded
from kvcomp_jax.codecs.wrapper import Wrapper
from kvcomp_jax.types import pytree, static
from pallas_kernels.hadamard import check_hadamard, hadamard, rotate_quantize_pack


@pytree
class Rotated(Wrapper):
    """Rotate rows by an orthonormal Hadamard matrix H before the inner codec stores them: x -> (x * signs) H.

    Spreads outlier channels over all channels, so that the inner codec sees a flatter range. Exact up to rounding:
    (q H)(k H)^T = q k^T; the inner codec's error keeps its norm. A read rotates queries and results, never a key.
    With `seed`, channels first get random signs, so that no row that looks like a row of H is gathered in one channel,
    and rows that a model already rotated by H are not turned back. Costs nothing in storage.
    Source: QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4; head_dims as in `pallas_kernels.hadamard`.
    """

    seed: int | None = static(default=None)

    @property
    def stored(self) -> Codec:
        """What the inner codec stores."""
        return self.inner.stored

    def enter(self, q: jax.Array) -> jax.Array:
        """Rotate queries."""
        return self.inner.enter(self._turn(q))

    def leave(self, mixed: jax.Array) -> jax.Array:
        """Undo the rotation of sums of values."""
        return self._turn_back(self.inner.leave(mixed))

    def encode(self, x: jax.Array, pos: jax.Array) -> Encoded:
        """Encode the rotated rows, which are not rounded to x's dtype; `Affine` rotates and quantises in one pass."""
        if type(self.inner) is Affine and self.inner.rounding == "nearest":
            return rotate_quantize_pack(self._signed(x), self.inner.format(x.shape[-1]))
        return self.inner.encode(self._turn(x), pos)

    def decode(self, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Undo the rotation of what the inner codec decodes, f32[*b, S, D]."""
        return self._turn_back(self.inner.decode(enc, pos))

    def dot(self, q: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return (q H) . K^T on the inner codec's rows."""
        return self.inner.dot(self._turn(q), enc, pos)

    def mix(self, p: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Undo the rotation of the mixed rows."""
        return self._turn_back(self.inner.mix(p, enc, pos))

    def rounded_query(self, q: jax.Array) -> jax.Array:
        """Return q [*b, R, D] as the inner codec rounds it once it is rotated, turned back."""
        return self._turn_back(self.inner.rounded_query(self._turn(q)))

    def rounded_probs(self, p: jax.Array) -> jax.Array:
        """The inner codec's: rotation is of channels, and probabilities have none."""
        return self.inner.rounded_probs(p)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if there is no Hadamard matrix for head_dim, or the inner codec cannot store such rows."""
        check_hadamard(head_dim)
        self.inner.check(head_dim, block_size)

    def fit(self, x: jax.Array, live: jax.Array) -> Self:
        """Fit the inner codec to rotated rows."""
        return dataclasses.replace(self, inner=self.inner.fit(self._turn(x), live))

    def _signed(self, x: jax.Array) -> jax.Array:
        if self.seed is None:
            return x
        return x * jnp.asarray(_signs(self.seed, x.shape[-1]), x.dtype).reshape(*(1,) * (x.ndim - 1), -1)

    def _turn(self, x: jax.Array) -> jax.Array:
        """Rotate in float32."""
        return hadamard(self._signed(x.astype(jnp.float32)))

    def _turn_back(self, x: jax.Array) -> jax.Array:
        """The matrix is its own inverse, and so are the signs."""
        return self._signed(hadamard(x.astype(jnp.float32)))


@lru_cache
def _signs(seed: int, dim: int) -> np.ndarray:
    """+1 or -1 for each channel: f32[D]."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), dim)
