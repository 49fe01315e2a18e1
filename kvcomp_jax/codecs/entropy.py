"""Entropy coding: frequent codes take fewer bits."""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvcomp_jax.codecs.base import Encoded
from kvcomp_jax.codecs.budgeted import Budgeted
from kvcomp_jax.codecs.integer import bell
from kvcomp_jax.types import pytree, static
from pallas_kernels.entropy_decode import rows, streams
from pallas_kernels.entropy_decode.canonical import code_lengths
from pallas_kernels.entropy_decode.formats import StreamFormat, Streams


@pytree
class Coded:
    """A slot a unit, see `Streams`, and the inner codec's metadata."""

    words: jax.Array  # u32[*b, units, W]
    ends: jax.Array  # u8[*b, units, T]
    choice: jax.Array  # u8[*b, units]
    metadata: Encoded
    head_dim: int = static()


@pytree
class Entropy(Budgeted):
    """Store codes as canonical prefix codes of bounded length, whose tables come from the prompt.

    There is a table for each row, KV head and step that a unit may take (see `Budgeted`), all symbols have a code in
    each, and after them plain packing counts as one more table. Before a prompt is seen tables suit a bell of codes.
    along="token" puts a token's channels next to each other in a stream, "channel" a channel's tokens; streams of about
    128 symbols start at whole bytes and are decoded side by side, 8 bits of metadata each.
    Source: KVComp, arXiv:2509.00579; there one table a layer, and a 16-bit offset a stream.
    """

    along: Literal["token", "channel"] = static(default="token")
    lengths: jax.Array | None = None  # u8[B, K, stretches, symbols], bits of each code

    @property
    def max_bits(self) -> int:
        """Longest code: two bits beyond plain packing, eight at least; more gains nothing and makes tables larger."""
        return max(8, self.inner.code_bits() + 2)

    def format(self, head_dim: int) -> StreamFormat:
        """How streams of rows of `head_dim` lie."""
        return StreamFormat(self.block, head_dim, self.along, self.max_bits, self.inner.plain_bits(self.budget))

    def prepare(self, batch: int, num_kv_heads: int, head_dim: int) -> "Entropy":
        """Give every row and head the tables of no prompt."""
        del head_dim
        lengths = jnp.broadcast_to(self._lengths(), (batch, num_kv_heads, *self._lengths().shape))
        return dataclasses.replace(self, lengths=lengths)

    @property
    def fits(self) -> bool:
        """True: tables are a prompt's."""
        return True

    def fit(self, x: jax.Array, live: jax.Array) -> "Entropy":
        """Make the tables from the histograms of a prompt x [B, K, S, D], whole blocks of live tokens bool[B, 1, S].

        Every symbol counts once more than it was seen, so that each has a code. Rows without a whole block keep the
        tables of no prompt.
        """
        size = x.shape[2] // self.block * self.block
        if not size:
            return self
        whole = live[:, :, :size].reshape(*live.shape[:2], -1, self.block).all(-1)
        seen = jnp.repeat(jnp.broadcast_to(whole, (*x.shape[:2], whole.shape[-1])), self.block, -1)

        def count(stretch: jax.Array) -> jax.Array:
            codes = self.inner.quantise(x[:, :, :size], stretch)[0].astype(jnp.int32)
            at = jnp.where(seen[..., None], codes, self.inner.num_levels)
            b, h = (jnp.arange(n) for n in x.shape[:2])
            counts = jnp.zeros((*x.shape[:2], self.inner.num_levels), jnp.int32)
            return counts.at[b[:, None, None, None], h[None, :, None, None], at].add(1, mode="drop")

        counts = jnp.moveaxis(lax.map(count, jnp.array(self.stretches, jnp.float32)), 0, 2)
        any_seen = seen.any(-1)[..., None, None]
        unseen = jnp.broadcast_to(self._lengths(), counts.shape)
        lengths = jnp.where(any_seen, code_lengths(counts + 1, self.max_bits), unseen)
        return dataclasses.replace(self, lengths=lengths)

    def encode(self, x: jax.Array, pos: jax.Array) -> Coded:
        """Code x [*b, S, D]; S a multiple of `block`."""
        del pos
        fmt = self.format(x.shape[-1])
        tables = self._tables(x.shape[:-2])
        slot = self.slot_bits(x.shape[-1]) // 8

        def cost(codes: jax.Array, j: jax.Array) -> jax.Array:
            table = lax.dynamic_index_in_dim(tables, j, tables.ndim - 2, keepdims=False)
            return streams.stream_bytes(codes, table, fmt).sum(-1)

        codes, metadata, choice = self.fitting(x, slot, cost)
        words, ends = streams.write(codes, streams.with_plain(tables, fmt), choice, slot // 4, fmt)
        return Coded(words=words, ends=ends, choice=choice, metadata=metadata, head_dim=x.shape[-1])

    def decode(self, enc: Coded, pos: jax.Array) -> jax.Array:
        """Return the inner codec's rows, f32[*b, S, D]."""
        del pos
        return rows.decoded(*self.operands(enc))

    def dot(self, q: jax.Array, enc: Coded, pos: jax.Array) -> jax.Array:
        """Multiply symbols as they are decoded, where there are few queries."""
        del pos
        return rows.dot(q.astype(jnp.float32), *self.operands(enc))

    def mix(self, p: jax.Array, enc: Coded, pos: jax.Array) -> jax.Array:
        """Multiply symbols as they are decoded, where there are few queries."""
        del pos
        return rows.mix(p.astype(jnp.float32), *self.operands(enc))

    def operands(self, enc: Coded) -> tuple[Streams, jax.Array, StreamFormat]:
        """What the products of `entropy_decode` take: arrays, tables and format."""
        fmt = self.format(enc.head_dim)
        scale, zero_point = self.inner.grid(enc.metadata)
        stored = Streams(enc.words, enc.ends, enc.choice, scale, zero_point)
        return stored, streams.with_plain(self._tables(enc.choice.shape[:-1]), fmt), fmt

    def spare_bits(self, enc: Coded) -> jax.Array:
        """Bits of each slot that no stream reaches, i32[*b, units]."""
        return self.slot_bits(enc.head_dim) - 8 * enc.ends.astype(jnp.int32).sum(-1)

    def slot_bits(self, head_dim: int) -> int:
        """Bits of the words of a unit: `budget` a value, and at least plain packing."""
        fmt = self.format(head_dim)
        asked = 0 if self.budget is None else self.budget * self.block * head_dim
        return 32 * math.ceil(max(asked, 8 * fmt.plain_bytes) / 32)

    def head_bits(self, head_dim: int) -> int:
        """A byte a stream, and one that says which table."""
        return 8 * (self.format(head_dim).num_streams + 1)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if a stream's bytes may not fit in a byte."""
        fmt = self.format(head_dim)
        if fmt.stream * fmt.max_bits > 8 * 255:
            raise ValueError(f"streams of {fmt.stream} codes of up to {fmt.max_bits} bits exceed 255 bytes; "
                             f"choose another block than {self.block}.")  # fmt: skip
        super().check(head_dim, block_size)

    def _lengths(self) -> jax.Array:
        """Tables of no prompt, u8[stretches, symbols]."""
        levels = [max(math.ceil(self.inner.num_levels / stretch), 2) for stretch in self.stretches]
        return jnp.asarray(_bell_lengths(tuple(levels), self.inner.num_levels, self.max_bits))

    def _tables(self, leading: tuple[int, ...]) -> jax.Array:
        """Tables u8[*leading, stretches, symbols]."""
        if self.lengths is not None:
            return self.lengths
        lengths = self._lengths()
        return jnp.broadcast_to(lengths, (*leading, *lengths.shape))


@functools.lru_cache
def _bell_lengths(levels: tuple[int, ...], num_levels: int, max_bits: int) -> np.ndarray:
    """Lengths u8[len(levels), num_levels] for bells of so many levels; a constant to programs, not a part of them."""
    with jax.ensure_compile_time_eval():
        lengths = jax.jit(lambda n: code_lengths(bell(n, num_levels), max_bits))
        return np.asarray(lengths(np.array(levels, np.int32)))
