"""Streams of prefix codes on TPUs: a lane decodes a stream, eight units along sublanes, whatever lies where.

A stream's next words are picked out of its unit's, a code's symbol and length out of its unit's table. Words of four
symbols are put down by lines and then brought from the order of streams into that of lines.
Source: one short stream a thread: KVComp, arXiv:2509.00579.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.entropy_decode.formats import StreamFormat, Streams
from pallas_kernels.entropy_decode.tpu_lanes import EIGHT, before, registers
from pallas_kernels.tpu_rows import LANES, SUBLANES, pick, whole_lanes


class _Bits(NamedTuple):
    """Where the streams of eight units are: i32[8, 128] each, of u32 the bits."""

    here: jax.Array  # the word at work
    after: jax.Array  # the word after it
    next: jax.Array  # number of the word after that
    bit: jax.Array  # of `here` that comes next


@dataclasses.dataclass(frozen=True)
class StreamsReader:
    """See `tpu_side.Reader`; the three parts are words, bytes of streams, later their sums, and choices of tables."""

    fmt: StreamFormat
    num_words: int  # of a unit
    num_tables: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """See `tpu_side.Reader`."""
        return self.num_words, self.fmt.num_streams, 1

    @property
    def tables(self) -> tuple[int, int]:
        """See `tpu_side.Reader`: two entries a word."""
        return self.num_tables, max(2**self.fmt.max_bits // 2, LANES)

    @property
    def words_of_piece(self) -> int:
        """Words of four symbols of a line's part in one stream."""
        return self.fmt.line // self.fmt.pieces // 4

    def scratch(self, tile: int) -> tuple:
        """See `tpu_side.Reader`: the words of each line of a stream, streams along lanes."""
        rows = tile // self.fmt.block * self.words_of_piece
        return tuple(
            pltpu.VMEM((rows, whole_lanes(self.fmt.num_streams)), jnp.int32) for _ in range(self.fmt.lines_together)
        )

    def arrays(self, x: Streams) -> tuple[jax.Array, ...]:
        """See `tpu_side.Reader`."""
        return x.words, x.ends, x.choice[..., None]

    def prepare(self, parts: Any) -> None:
        """See `tpu_side.Reader`: bytes of streams become those before them."""
        _, ends, _ = parts
        count = self.fmt.num_streams
        ends[:, :count] = before(ends[:, :count] & 255)

    def decode(self, parts: Any, tables: Any, scratch: Any, first: jax.Array, out: Any) -> None:
        """See `tpu_side.Reader`."""
        num_units = scratch[0].shape[0] // self.words_of_piece
        chains = [(u, c) for u in range(0, num_units, SUBLANES) for c in range(0, self.fmt.num_streams, LANES)]
        known = [self._table(parts, tables, first + u) for u, _ in chains]
        start = [self._open(parts, first + u, c) for u, c in chains]
        for j in range(self.fmt.lines_together):

            def word(i, bits, j=j):
                after = []
                for (u, c), at, table in zip(chains, bits, known, strict=True):
                    at, symbols = self._four(parts, first + u, at, table)
                    rows = pl.ds(u * self.words_of_piece + i, SUBLANES, stride=self.words_of_piece)
                    scratch[j][rows, c : c + LANES] = symbols
                    after.append(at)
                return after

            start = lax.fori_loop(0, self.words_of_piece, word, start)
        self._by_lines(scratch, out)

    def _open(self, parts: Any, unit: jax.Array, stream: int) -> _Bits:
        begin = registers(parts[1], unit, stream, stream)[0]
        word = begin >> 2
        return _Bits(self._word(parts, unit, word), self._word(parts, unit, word + 1), word + 2, (begin & 3) * 8)

    def _word(self, parts: Any, unit: jax.Array, number: jax.Array) -> jax.Array:
        return pick(registers(parts[0], unit, 0, self.num_words - 1), number)

    def _table(self, parts: Any, tables: Any, unit: jax.Array) -> list[jax.Array]:
        """The table of each unit in a sublane."""
        choice = jnp.broadcast_to(registers(parts[2], unit, 0, 0)[0][:, :1], EIGHT)
        found = []
        for i in range(0, self.tables[1], LANES):
            mine = jnp.broadcast_to(tables[:1, i : i + LANES], EIGHT)
            for j in range(1, self.num_tables):
                mine = jnp.where(choice == j, jnp.broadcast_to(tables[j : j + 1, i : i + LANES], EIGHT), mine)
            found.append(mine)
        return found

    def _four(self, parts: Any, unit: jax.Array, at: _Bits, table: list[jax.Array]) -> tuple[_Bits, jax.Array]:
        """The next four symbols of each stream, the first in the lowest byte."""
        max_bits, symbols = self.fmt.max_bits, jnp.zeros(EIGHT, jnp.int32)
        safe = max(n for n in (1, 2, 4) if n * max_bits <= 32)  # symbols that end in the next word at the latest
        for i in range(4):
            if i % safe == 0:
                coming = self._word(parts, unit, at.next)
            bits = (at.here << at.bit) | lax.shift_right_logical(lax.shift_right_logical(at.after, 31 - at.bit), 1)
            index = lax.shift_right_logical(bits, 32 - max_bits)
            entry = pick(table, index >> 1) >> ((index & 1) << 4)
            symbols |= (entry & 255) << 8 * i
            bit = at.bit + ((entry >> 8) & 255)
            over = bit >= 32
            at = _Bits(
                jnp.where(over, at.after, at.here), jnp.where(over, coming, at.after),
                jnp.where(over, at.next + 1, at.next), bit & 31,
            )  # fmt: skip
        return at, symbols

    def _by_lines(self, scratch: Any, out: Any) -> None:
        """Bring words from the lanes of their streams to those of their lines."""
        fmt, part = self.fmt, self.words_of_piece
        for unit in range(scratch[0].shape[0] // part):
            for piece in range(fmt.pieces):
                target = (unit * fmt.pieces + piece) * part
                for row in range(0, part, SUBLANES):
                    rows = slice(unit * part + row, unit * part + min(row + SUBLANES, part))
                    held = [[ref[rows, i : i + LANES] for i in range(0, ref.shape[1], LANES)] for ref in scratch]
                    for lane in range(0, fmt.num_lines, LANES):
                        size = rows.stop - rows.start
                        out[target + row : target + row + size, lane : lane + LANES] = self._lines(held, piece, lane)

    def _lines(self, held: list[list[jax.Array]], piece: int, first: int) -> jax.Array:
        """Lines `first` .. + 128 of what registers `held` have by line of a stream, then streams along lanes."""
        together, pieces = self.fmt.lines_together, self.fmt.pieces
        if together * pieces == 1:
            return held[0][first // LANES]
        line = first + lax.broadcasted_iota(jnp.int32, held[0][0].shape, 1)
        mine = [pick(streams, line // together * pieces + piece) for streams in held]
        found = mine[0]
        for j, other in enumerate(mine[1:], 1):
            found = jnp.where(line % together == j, other, found)
        return found


def packed_tables(tables: jax.Array) -> jax.Array:
    """Entries u16[*b, J, n] two a word, i32[*b, J, max(n / 2, 128)]."""
    pairs = tables.astype(jnp.int32).reshape(*tables.shape[:-1], -1, 2)
    words = pairs[..., 0] | (pairs[..., 1] << 16)
    return jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, max(0, LANES - words.shape[-1]))])
