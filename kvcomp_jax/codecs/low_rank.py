"""Rows kept as their coefficients in a few directions of each head."""

import dataclasses
from functools import lru_cache
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from kvcomp_jax.codecs.base import Codec, Encoded
from kvcomp_jax.codecs.wrapper import Wrapper
from kvcomp_jax.types import Constant, pytree, static

RANKS = 16  # ranks are multiples of it: rows of what tensor cores, and the 16-bit tiles of a TPU, take


@pytree
class Coefficients(Wrapper):
    """Rows in the basis of a `LowRank`, as its inner codec stores them: of a rank that keys and values need not share.

    What `LowRank.stored` is, so that a read knows that it multiplies coefficients.
    """

    def encode(self, x: jax.Array, pos: jax.Array) -> Encoded:
        """The inner codec's."""
        return self.inner.encode(x, pos)

    def decode(self, enc: Encoded, pos: jax.Array) -> jax.Array:
        """The inner codec's."""
        return self.inner.decode(enc, pos)

    def dot(self, q: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """The inner codec's."""
        return self.inner.dot(q, enc, pos)

    def mix(self, p: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """The inner codec's."""
        return self.inner.mix(p, enc, pos)

    def rounded_query(self, q: jax.Array) -> jax.Array:
        """The inner codec's."""
        return self.inner.rounded_query(q)

    def rounded_probs(self, p: jax.Array) -> jax.Array:
        """The inner codec's."""
        return self.inner.rounded_probs(p)


@pytree
class LowRank(Wrapper):
    """Store the coefficients x @ basis [*b, K, S, r] in the inner codec, with an orthonormal basis for each head.

    Decoding gives basis @ basis^T x, the projection of x, so that r = D loses nothing but rounding. A read projects
    queries and brings sums of values back, two small products a step; no row is ever expanded. A token costs r
    channels of the inner codec instead of D, and the basis, which an empty cache has as an array, one copy a row,
    4 D r bytes a head. The scale of the softmax stays that of D.
    """

    basis: Constant = static()  # f32[K, D, r], columns orthonormal
    held: jax.Array | None = None  # f32[B, K, D, r] of a cache, see `prepare`

    def __post_init__(self) -> None:
        shape = self.basis.value.shape
        if len(shape) != 3 or not 0 < shape[2] <= shape[1] or shape[2] % RANKS:
            raise ValueError(f"basis {shape} must be [K, D, r] with the rank r a multiple of {RANKS}, at most D.")
        if not _departure(self.basis) < 1e-4:
            raise ValueError(
                f"the columns of basis {shape} must be orthonormal, but basis^T basis is off by "
                f"{_departure(self.basis):.2g}; take the Q of its QR decomposition."
            )

    @property
    def rank(self) -> int:
        """r: coefficients of a row."""
        return self.basis.value.shape[2]

    @property
    def stored(self) -> Codec:
        """The coefficients as the inner codec stores them."""
        return Coefficients(inner=self.inner.stored)

    def enter(self, q: jax.Array) -> jax.Array:
        """Project queries [*b, K, R, D] to [*b, K, R, r]."""
        return self.inner.enter(self._project(q))

    def leave(self, mixed: jax.Array) -> jax.Array:
        """Bring sums of coefficients [*b, K, R, r] back to [*b, K, R, D]."""
        return self._expand(self.inner.leave(mixed))

    def encode(self, x: jax.Array, pos: jax.Array) -> Encoded:
        """Encode the coefficients of x [*b, K, S, D], computed in float32."""
        return self.inner.encode(self._project(x), pos)

    def decode(self, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return the rows that the decoded coefficients stand for, f32[*b, K, S, D]."""
        return self._expand(self.inner.decode(enc, pos))

    def dot(self, q: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return (q basis) . C^T on the inner codec's coefficients C."""
        return self.inner.dot(self._project(q), enc, pos)

    def mix(self, p: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return (p . C) basis^T."""
        return self._expand(self.inner.mix(p, enc, pos))

    def rounded_query(self, q: jax.Array) -> jax.Array:
        """Return the projection of q [*b, K, R, D] as the inner codec rounds it, in all D channels."""
        return self._expand(self.inner.rounded_query(self._project(q)))

    def rounded_probs(self, p: jax.Array) -> jax.Array:
        """The inner codec's: the basis is of channels, and probabilities have none."""
        return self.inner.rounded_probs(p)

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """The inner codec's for rows of r channels; the basis is a parameter of the cache and counted there."""
        del head_dim
        return self.inner.nbits(num_tokens, self.rank)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """The inner codec's for rows of r channels."""
        del head_dim
        return self.inner.metadata_bits(num_tokens, self.rank)

    def size(self, num_tokens: int, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
        """The inner codec's for rows of r channels."""
        del head_dim
        return self.inner.size(num_tokens, num_kv_heads, self.rank)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if the basis is of another head_dim, or the inner codec cannot store rows of r channels."""
        if self.basis.value.shape[1] != head_dim:
            raise ValueError(f"a basis of {self.basis.value.shape[1]} channels does not fit head_dim={head_dim}.")
        self.inner.check(self.rank, block_size)

    def prepare(self, batch: int, num_kv_heads: int, head_dim: int) -> Self:
        """Return this codec with its basis as an array [B, K, D, r], and the inner one prepared for r channels."""
        if self.basis.value.shape[:2] != (num_kv_heads, head_dim):
            raise ValueError(
                f"bases {self.basis.value.shape} do not fit heads and channels {(num_kv_heads, head_dim)}; heads that "
                "share slots, or of which only some have them, cannot keep a basis each."
            )
        held = jnp.tile(jnp.asarray(self.basis.value, jnp.float32)[None], (batch, 1, 1, 1))
        return dataclasses.replace(self, held=held, inner=self.inner.prepare(batch, num_kv_heads, self.rank))

    def fit(self, x: jax.Array, live: jax.Array) -> Self:
        """Fit the inner codec to coefficients."""
        return dataclasses.replace(self, inner=self.inner.fit(self._project(x), live))

    def _project(self, x: jax.Array) -> jax.Array:
        return _product("...sd,...dr->...sr", x, self._basis(x.ndim))

    def _expand(self, x: jax.Array) -> jax.Array:
        return _product("...sr,...dr->...sd", x, self._basis(x.ndim))

    def _basis(self, ndim: int) -> jax.Array:
        """The basis [..., K, D, r] for rows of `ndim` dimensions."""
        held = jnp.asarray(self.basis.value, jnp.float32) if self.held is None else self.held
        return held.reshape(*(1,) * (ndim - held.ndim), *held.shape)


def _product(subscripts: str, x: jax.Array, basis: jax.Array) -> Any:
    """In float32 throughout: a TPU would else round both to bfloat16, and coefficients are all that is kept."""
    return jnp.einsum(subscripts, x.astype(jnp.float32), basis, precision="highest")


@lru_cache
def _departure(basis: Constant) -> float:
    """The largest element of basis^T basis - 1; kept, because codecs are made anew whenever a cache is unflattened."""
    x = basis.value.astype(np.float64)
    return float(np.abs(x.swapaxes(-1, -2) @ x - np.eye(x.shape[-1])).max())
