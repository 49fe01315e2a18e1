"""Dense and sparse: the extreme values of a row beside the rest of it."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.codecs.base import Encoded
from kvcomp_jax.codecs.wrapper import Wrapper
from kvcomp_jax.types import pytree, static
from pallas_kernels.codebook_decode.rows import CodebookRows, place


class Sparse(NamedTuple):
    """Dense rows, and what is added to some of their channels."""

    dense: Encoded
    values: jax.Array  # [*b, S, num_outliers], what the dense row lacks there
    channels: jax.Array  # u8 or u16[*b, S, num_outliers], channels, each at most once a row


@pytree
class Outliers(Wrapper):
    """Keep the num_outliers / 2 highest and as many lowest values of each row beside it, and the rest in `inner`.

    The inner codec sees the outliers cut back to the extremes of the rest, so that its ranges do not know them; what
    it then lacks of them is stored: a value and a channel each. Selected by rank, so their number is exact also where
    values are equal. The sum is right up to the rounding of `value_dtype`, in which finite values saturate.
    `dot` gathers q at the outliers' channels; `mix` adds them to a decoded block, see `place`.
    Source: the sparse part of SqueezeLLM, Kim et al. 2023, arXiv:2306.07629; for caches KVQuant, Hooper et al. 2024,
    arXiv:2401.18079, section 3.4.
    """

    num_outliers: int = static()
    value_dtype: str = static(default="float16")

    def __post_init__(self) -> None:
        if self.num_outliers < 2 or self.num_outliers % 2:
            raise ValueError(f"num_outliers={self.num_outliers} must be even and at least 2: half on each side.")

    def encode(self, x: jax.Array, pos: jax.Array) -> Sparse:
        """Encode x [*b, S, D]; a value that is not finite is stored as an outlier before any other."""
        x = x.astype(jnp.float32)
        index = self._select(x)
        dense = self.inner.encode(self._cut(x, index), pos)
        lacking = jnp.take_along_axis(x - self.inner.decode(dense, pos), index, -1)
        largest = float(jnp.finfo(self.value_dtype).max)
        values = jnp.where(jnp.isfinite(lacking), jnp.clip(lacking, -largest, largest), lacking)
        return Sparse(dense, values.astype(self.value_dtype), index.astype(_index_dtype(x.shape[-1])))

    def decode(self, enc: Sparse, pos: jax.Array) -> jax.Array:
        """Return the dense rows with the outliers added, f32[*b, S, D]."""
        x = self.inner.decode(enc.dense, pos).astype(jnp.float32)
        return x + place(jnp.zeros(()), enc.channels, enc.values.astype(jnp.float32), x.shape[-1])

    def dot(self, q: jax.Array, enc: Sparse, pos: jax.Array) -> jax.Array:
        """Return q . K^T of the dense part, and for each outlier its value times q's channel."""
        *b, num_rows, _ = q.shape
        index = enc.channels.astype(jnp.int32).reshape(*b, 1, -1)  # [*b, 1, S m]
        picked = jnp.take_along_axis(q.astype(jnp.float32), index, -1)  # [*b, R, S m]
        picked = picked.reshape(*b, num_rows, *enc.channels.shape[-2:])
        sparse = jnp.einsum("...rsm,...sm->...rs", picked, enc.values.astype(jnp.float32))
        return self.inner.dot(q, enc.dense, pos) + sparse

    def codebook_rows(self, enc: Sparse) -> CodebookRows | None:
        """The inner codec's with the outliers, if it has none and its rows are not in other units."""
        rows = self.inner.codebook_rows(enc.dense)
        if rows is None or rows.outliers is not None or not rows.by_token:
            return None
        return rows._replace(outliers=enc.values, outlier_channels=enc.channels)

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """The inner codec's, and a value and a channel an outlier."""
        return self.inner.nbits(num_tokens, head_dim) + self._sparse_bits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """All that is sparse counts as metadata."""
        return self.inner.metadata_bits(num_tokens, head_dim) + self._sparse_bits(num_tokens, head_dim)

    def size(self, num_tokens: int, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
        """The inner codec's, and the outliers of each row."""
        total, metadata = self.inner.size(num_tokens, num_kv_heads, head_dim)
        sparse = num_kv_heads * self._sparse_bits(num_tokens, head_dim)
        return total + sparse, metadata + sparse

    def spare_bits(self, enc: Sparse) -> jax.Array | None:
        """The inner codec's; slots for outliers are always full."""
        return self.inner.spare_bits(enc.dense)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if a row is all outliers, or the inner codec cannot store it."""
        if self.num_outliers >= head_dim:
            raise ValueError(f"num_outliers={self.num_outliers} must be less than the {head_dim} channels of a row.")
        self.inner.check(head_dim, block_size)

    def fit(self, x: jax.Array, live: jax.Array) -> Self:
        """Fit the inner codec to rows without outliers."""
        return dataclasses.replace(self, inner=self.inner.fit(self._cut(x, self._select(x)), live))

    def _select(self, x: jax.Array) -> jax.Array:
        """Channels i32[*b, S, num_outliers], the highest first; NaN counts as high. No channel twice."""
        half = self.num_outliers // 2
        order = jnp.where(jnp.isnan(x), jnp.inf, x)
        high = lax.top_k(order, half)[1]
        low = lax.top_k(-place(order, high, jnp.full(high.shape, jnp.inf), x.shape[-1]), half)[1]
        return jnp.concatenate([high, low], -1)

    def _cut(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """Bring the outliers of x to the extremes of the rest."""
        half, dim = self.num_outliers // 2, x.shape[-1]
        chosen = place(jnp.zeros(x.shape, bool), index, jnp.ones(index.shape, bool), dim)
        top = jnp.where(chosen, -jnp.inf, x).max(-1, keepdims=True)
        bottom = jnp.where(chosen, jnp.inf, x).min(-1, keepdims=True)
        ends = jnp.concatenate([jnp.repeat(top, half, -1), jnp.repeat(bottom, half, -1)], -1)
        return place(x, index, ends, dim)

    def _sparse_bits(self, num_tokens: int, head_dim: int) -> int:
        num_tokens = -(-num_tokens // self.unit) * self.unit
        each = jnp.dtype(self.value_dtype).itemsize + _index_dtype(head_dim).itemsize
        return num_tokens * self.num_outliers * each * 8


def _index_dtype(dim: int) -> jnp.dtype:
    return jnp.dtype(jnp.uint8 if dim <= 256 else jnp.uint16)
