"""Attention on integer codes: products of codes, corrected by stored sums of codes, never a decoded row."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.affine import Affine
from kvcomp_jax.codecs.base import Codec
from kvcomp_jax.types import pytree, static
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.homomorphic_decode import code_sums, products, sums_dtype
from pallas_kernels.homomorphic_decode.partitions import rounded


class Summed(NamedTuple):
    """Quantised rows and what their products are corrected with."""

    rows: Quantized
    sums: jax.Array | None  # of each group's codes, shaped as its scale; None: taken anew at every read


@pytree
class Homomorphic(Codec):
    """Store rows as `inner` does and multiply them as integers.

    An affine code is linear, so a product of two affine rows is an integer product of their codes plus terms in sums of
    codes, wherever scales are constant along what is summed over. So codes grouped per token (keys) have an integer
    `dot` and codes grouped per channel (values) an integer `mix`; the other contraction decodes, as in any codec.
    The second operand is rounded to 8 bits, to the nearest, a group of channels of q or of tokens of p at a time.
    Sums are kept from `encode` on in the narrowest integers that hold them, or with `keep_sums=False` not stored.
    Source: HACK, Zhang et al. 2025, arXiv:2502.03589 (there summation elimination).
    """

    inner: Affine
    keep_sums: bool = static(default=True)

    @property
    def unit(self) -> int:
        """The inner codec's."""
        return self.inner.unit

    @property
    def kind(self) -> Any:
        """The type and the axis: only one of the two products is one of integers."""
        return type(self), self.inner.axis

    def format(self, head_dim: int) -> Format:
        """What the arrays of an encoding of rows of `head_dim` mean."""
        return self.inner.format(head_dim)

    def encode(self, x: jax.Array, pos: jax.Array) -> Summed:
        """Quantise x [*b, S, D] and sum the codes of every group."""
        rows = self.inner.encode(x, pos)
        return Summed(rows, code_sums(rows, self.format(x.shape[-1])) if self.keep_sums else None)

    def decode(self, enc: Summed, pos: jax.Array) -> jax.Array:
        """Return codes * scale + zero_point, f32[*b, S, D]."""
        return self.inner.decode(enc.rows, pos)

    def sums(self, enc: Summed) -> jax.Array:
        """The sums of the codes of every group, stored or taken now."""
        return code_sums(enc.rows, self.format(enc.rows.codes.shape[-1])) if enc.sums is None else enc.sums

    def rounded_query(self, q: jax.Array) -> jax.Array:
        """Return q [*b, R, D] rounded to 8 bits a group of channels, for keys."""
        if self.inner.axis != "token":
            return q
        return rounded(q.astype(jnp.float32), self.format(q.shape[-1]).group_size)

    def rounded_probs(self, p: jax.Array) -> jax.Array:
        """Return p [*b, R, S] rounded to 8 bits a group of tokens, for values."""
        if self.inner.axis != "channel":
            return p
        return rounded(p, self.format(p.shape[-1]).group_size)

    def dot(self, q: jax.Array, enc: Summed, pos: jax.Array) -> jax.Array:
        """Return q . K^T, f32[*b, R, S], by integer products where keys group per token."""
        if self.inner.axis != "token":
            return super().dot(q, enc, pos)
        fmt = self.format(q.shape[-1])

        def one(q: jax.Array, rows: Quantized, sums: jax.Array) -> jax.Array:
            return products.dot(products.rounded_queries(q, fmt), rows, sums, fmt)

        return _each_head(one, q.ndim - 2)(q, enc.rows, self.sums(enc))

    def mix(self, p: jax.Array, enc: Summed, pos: jax.Array) -> jax.Array:
        """Return p . V, f32[*b, R, D], by integer products where values group per channel."""
        if self.inner.axis != "channel":
            return super().mix(p, enc, pos)
        fmt = self.format(enc.rows.codes.shape[-1])

        def one(p: jax.Array, rows: Quantized, sums: jax.Array) -> jax.Array:
            return products.mix(p, rows, sums, fmt)

        return _each_head(one, p.ndim - 2)(p, enc.rows, self.sums(enc))

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """The inner codec's, and the sums."""
        return self.inner.nbits(num_tokens, head_dim) + self._sums_bits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """The inner codec's, and the sums."""
        return self.inner.metadata_bits(num_tokens, head_dim) + self._sums_bits(num_tokens, head_dim)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if the inner codec cannot store such rows."""
        self.inner.check(head_dim, block_size)

    def bind(self, dtype: Any) -> "Homomorphic":
        """Bind the inner codec."""
        return dataclasses.replace(self, inner=self.inner.bind(dtype))

    def _sums_bits(self, num_tokens: int, head_dim: int) -> int:
        if not self.keep_sums:
            return 0
        fmt = self.format(head_dim)
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return num_tokens * head_dim // fmt.group_size * sums_dtype(fmt).itemsize * 8


def _each_head(function: Callable[..., jax.Array], num_axes: int) -> Callable[..., jax.Array]:
    """Map over leading axes."""
    for _ in range(num_axes):
        function = jax.vmap(function)
    return function
