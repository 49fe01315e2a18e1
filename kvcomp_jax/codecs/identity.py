"""Rows as they are."""

from typing import Any

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.base import Codec
from kvcomp_jax.types import pytree, static


@pytree
class Identity(Codec):
    """Store rows exactly, in the dtype of the cache."""

    dtype: str | None = static(default=None)  # None until bound to a cache

    @property
    def unit(self) -> int:
        """1: every token stands alone."""
        return 1

    def encode(self, x: jax.Array, pos: jax.Array) -> jax.Array:
        """Return x, in this codec's dtype."""
        del pos
        return x if self.dtype is None else x.astype(self.dtype)

    def decode(self, enc: jax.Array, pos: jax.Array) -> jax.Array:
        """Return the rows."""
        del pos
        return enc

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """num_tokens * head_dim elements of the dtype."""
        if self.dtype is None:
            raise ValueError("Identity() has no size before it is bound to a cache's dtype; use Identity(dtype=...).")
        return num_tokens * head_dim * jnp.dtype(self.dtype).itemsize * 8

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """0."""
        del num_tokens, head_dim
        return 0

    def bind(self, dtype: Any) -> "Identity":
        """Fix the dtype."""
        return Identity(dtype=jnp.dtype(dtype).name)
