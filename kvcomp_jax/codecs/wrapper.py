"""What codecs that wrap another one have in common."""

import dataclasses
from typing import Any, Self

import jax

from kvcomp_jax.codecs.base import Codec, Encoded
from kvcomp_jax.types import pytree


@pytree
class Wrapper(Codec):
    """A codec that changes rows before an inner one stores them; what it does not define is the inner codec's."""

    inner: Codec

    @property
    def unit(self) -> int:
        """The inner codec's."""
        return self.inner.unit

    @property
    def name(self) -> str:
        """This codec's, with the inner one's in parentheses."""
        return f"{type(self).__name__}({self.inner.name})"

    @property
    def joins_heads(self) -> bool:
        """Whether the inner codec does."""
        return self.inner.joins_heads

    @property
    def uses_pos(self) -> bool:
        """Whether the inner codec does."""
        return self.inner.uses_pos

    @property
    def fits(self) -> bool:
        """Whether the inner codec does."""
        return self.inner.fits

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """The inner codec's."""
        return self.inner.nbits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """The inner codec's."""
        return self.inner.metadata_bits(num_tokens, head_dim)

    def size(self, num_tokens: int, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
        """The inner codec's."""
        return self.inner.size(num_tokens, num_kv_heads, head_dim)

    def spare_bits(self, enc: Encoded) -> jax.Array | None:
        """The inner codec's, whose encoding `enc` is."""
        return self.inner.spare_bits(enc)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if the inner codec cannot store such rows."""
        self.inner.check(head_dim, block_size)

    def bind(self, dtype: Any) -> Self:
        """Bind the inner codec."""
        return dataclasses.replace(self, inner=self.inner.bind(dtype))

    def prepare(self, batch: int, num_kv_heads: int, head_dim: int) -> Self:
        """Prepare the inner codec."""
        return dataclasses.replace(self, inner=self.inner.prepare(batch, num_kv_heads, head_dim))
