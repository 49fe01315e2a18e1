"""All KV heads of a token as one row of another codec."""

import dataclasses
from typing import Self

import jax

from kvcomp_jax.codecs.base import Encoded
from kvcomp_jax.codecs.wrapper import Wrapper
from kvcomp_jax.types import pytree, static
from pallas_kernels.codebook_decode.rows import CodebookRows


@pytree
class AcrossHeads(Wrapper):
    """Join the heads of a token, [*b, K, S, D] -> [*b, 1, S, K D], before the inner codec stores it.

    What the inner codec keeps once a row, a scale or slots for outliers, is then shared by all heads. Slots of all
    heads must be written together, which policies that go by age see to, and rungs with shares: there a row joins
    different tokens, and the inner codec may not ask where they stand. Reads decode and part by heads: contracting
    joined rows would multiply each query by the channels of every head.
    """

    num_heads: int = static()

    @property
    def joins_heads(self) -> bool:
        """True."""
        return True

    def encode(self, x: jax.Array, pos: jax.Array) -> Encoded:
        """Encode x [*b, K, S, D] as arrays [*b, 1, rows, ...]."""
        return self.inner.encode(self.join(x), pos[..., :1, :])

    def decode(self, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return the rows [*b, K, S, D]."""
        x = self.inner.decode(enc, pos[..., :1, :])  # [*b, 1, S, K D]
        *b, _, num_tokens, dim = x.shape
        return x.reshape(*b, num_tokens, self.num_heads, dim // self.num_heads).swapaxes(-2, -3)

    def codebook_rows(self, enc: Encoded) -> CodebookRows | None:
        """The inner codec's joined rows, if nothing is done to them yet that heads are parted for."""
        rows = self.inner.codebook_rows(enc)
        return rows if rows is not None and rows.by_token else None

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """A head's share, rounded up."""
        return -(-self.size(num_tokens, self.num_heads, head_dim)[0] // self.num_heads)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """A head's share, rounded up."""
        return -(-self.size(num_tokens, self.num_heads, head_dim)[1] // self.num_heads)

    def size(self, num_tokens: int, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
        """Bits of the joined rows."""
        return self.inner.size(num_tokens, 1, num_kv_heads * head_dim)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if the inner codec cannot store the joined rows."""
        self.inner.check(self.num_heads * head_dim, block_size)

    def prepare(self, batch: int, num_kv_heads: int, head_dim: int) -> Self:
        """Prepare the inner codec for joined rows."""
        inner = self.inner.prepare(batch, 1, num_kv_heads * head_dim)
        return dataclasses.replace(self, inner=inner)

    def fit(self, x: jax.Array, live: jax.Array) -> Self:
        """Fit the inner codec to joined rows."""
        return dataclasses.replace(self, inner=self.inner.fit(self.join(x), live))

    def join(self, x: jax.Array) -> jax.Array:
        """Return the rows [*b, 1, S, K D] of x [*b, K, S, D]."""
        *b, num_heads, num_tokens, head_dim = x.shape
        if num_heads != self.num_heads:
            raise ValueError(f"AcrossHeads(num_heads={self.num_heads}) got rows of {num_heads} heads.")
        return x.swapaxes(-2, -3).reshape(*b, 1, num_tokens, num_heads * head_dim)
