"""Rows whose channels another codec sees at comparable sizes."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.base import Codec, Encoded
from kvcomp_jax.codecs.wrapper import Wrapper
from kvcomp_jax.types import pytree

_DTYPE = jnp.float16  # of the stored factors


@pytree
class ChannelScaled(Wrapper):
    """Divide each channel by c = sqrt(max |x|) over a row's prompt before the inner codec stores it.

    Takes half of an outlier channel's exponent away, so that one scale a token suffices: when a channel grows
    hundredfold, the error of the others grows twice instead of seventeen times (4 bits, 1024 channels). A read
    multiplies queries and results by c, never a key or value.
    Factors belong to a row and a KV head, are taken from the whole prompt and kept while decoding; 1 for channels of
    zeros and where there was no prompt.
    Source: ZipCache, He et al. 2024, arXiv:2405.14256, section 4.2; there the maximum is pooled over the batch.
    """

    factor: jax.Array | None = None  # f16[B, K, D] in a cache

    @property
    def stored(self) -> Codec:
        """What the inner codec stores."""
        return self.inner.stored

    def enter(self, q: jax.Array) -> jax.Array:
        """Multiply queries by the factors."""
        return self.inner.enter(self._times(q))

    def leave(self, mixed: jax.Array) -> jax.Array:
        """Multiply sums of values by the factors."""
        return self._times(self.inner.leave(mixed))

    def encode(self, x: jax.Array, pos: jax.Array) -> Encoded:
        """Encode x / c."""
        return self.inner.encode(x.astype(jnp.float32) / self._factor(x), pos)

    def decode(self, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return what the inner codec decodes, times c: f32[*b, S, D]."""
        return self._times(self.inner.decode(enc, pos))

    def dot(self, q: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return (q c) . K^T on the inner codec's rows."""
        return self.inner.dot(self._times(q), enc, pos)

    def mix(self, p: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return the inner codec's mixed rows, times c."""
        return self._times(self.inner.mix(p, enc, pos))

    def prepare(self, batch: int, num_kv_heads: int, head_dim: int) -> Self:
        """Return this codec with factors of 1."""
        inner = self.inner.prepare(batch, num_kv_heads, head_dim)
        return dataclasses.replace(self, inner=inner, factor=jnp.ones((batch, num_kv_heads, head_dim), _DTYPE))

    @property
    def fits(self) -> bool:
        """True: factors are a prompt's."""
        return True

    def fit(self, x: jax.Array, live: jax.Array) -> Self:
        """Return this codec with the factors of a prompt."""
        largest = jnp.where(live[..., None], jnp.abs(x.astype(jnp.float32)), 0.0).max(2)
        factor = jnp.minimum(jnp.sqrt(largest), float(jnp.finfo(_DTYPE).max)).astype(_DTYPE)
        fitted = dataclasses.replace(self, factor=jnp.where(factor > 0, factor, jnp.ones_like(factor)))
        inner = self.inner.fit(x.astype(jnp.float32) / fitted._factor(x), live)
        return dataclasses.replace(fitted, inner=inner)

    def _factor(self, x: jax.Array) -> jax.Array:
        """The factors as x [*b, n, D] takes them."""
        if self.factor is None:
            raise TypeError("ChannelScaled has no factors before `prepare` or `fit`.")
        return self.factor[..., None, :].astype(jnp.float32)

    def _times(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) * self._factor(x)
