"""From packed words to the registers that wgmma reads: which thread loads what, and where each code goes.

A tile is 128 tokens, 4 units of 32, and 64 channels, a piece of a head. The matrix unit takes its left operand from
registers in 64 x 16 parts, of which thread (warp, r, c) holds rows `16 warp + r + 8 b` and columns `2 c + e + 8 h`. A
word holds tokens of one channel, so a thread that loads the words of two columns has several rows of both, and the
order of tokens is such that it needs no other thread's. Row `64 m + 16 warp + 8 b + r` of a tile, r = n q + rho, is

    token 32 warp + T rho + T/2 m + 2 q + b,   T = 32 / n,

where n (2, 4 or 8) is the number of words of a channel in a unit. The same byte permutes and shifts then serve keys,
whose columns are channels, and values, whose columns are tokens in this order.

`pairs` runs on values of the compiler or, in tests, on NumPy's integers.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from pallas_kernels.mosaic_gpu import Registers
from pallas_kernels.packing import unpack

TILE, UNIT, UNITS = 128, 32, 4
PIECE = 64
_ROWS = tuple((m, b) for m in range(2) for b in range(2))  # rows of a thread in a tile


def planes(bits: int) -> tuple[tuple[int, int, int], ...]:
    """Planes of a unit: (bits of the plane, its first row, one past its last); rows of words, or of bytes at 8 bits."""
    return {2: ((2, 0, 2),), 3: ((2, 0, 2), (1, 2, 3)), 4: ((4, 0, 4),), 8: ((8, 0, UNIT),)}[bits]


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a tile's tokens along rows of logits; `n` is 2, 4 or 8."""

    n: int

    @property
    def rows_of_bytes(self) -> tuple[tuple[str, int], ...]:
        """The 32 tokens of a unit as factors."""
        return ("rho", self.n), ("m", 2), ("q", 8 // self.n), ("b", 2)

    def token(self, row: Any) -> Any:
        """Token of the tile at a row; integers or arrays of them."""
        m, warp, b, r = row // 64, row // 16 % 4, row // 8 % 2, row % 8
        period = UNIT // self.n
        return UNIT * warp + period * (r % self.n) + period // 2 * m + 2 * (r // self.n) + b

    def arrange(self, x: jax.Array) -> jax.Array:
        """Bring [128, ...] from the tokens' order into the rows'."""
        parts = x.reshape(UNITS, self.n, 2, 8 // self.n, 2, -1)  # warp, rho, m, q, b
        return parts.transpose(2, 0, 4, 3, 1, 5).reshape(x.shape)

    def metadata(self, groups: int) -> Registers:
        """Registers of [4, 32 * groups], `groups` values of each token: a thread has those of its rows."""
        *outer, (_, b) = self.rows_of_bytes
        return Registers(((("warp", UNITS),), (*outer, ("b", b * groups))), ("warp",), ("q", "rho", 4))


def order_for(k_bits: int, v_bits: int) -> Order | None:
    """The order in which keys and values can both be unpacked, if it is known; bytes follow the other."""
    words = {2: 2, 3: 2, 4: 4, 8: 8}
    k, v = words[k_bits], words[v_bits]
    if k == v or v == 8 or (k_bits, v_bits) == (4, 2):
        return Order(k)
    return Order(v) if k == 8 else None


@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys as a left operand: rows are tokens, columns channels.

    Thread c takes `vector` adjacent channels, so columns are channels in another order, and q must follow it.

    Attributes:
      part: Channels that share a scale, which a thread's must not straddle; `PIECE` or more where scales cover tokens.
    """

    bits: int
    order: Order
    part: int

    @property
    def vector(self) -> int:
        """Channels that a thread loads together."""
        return min(16, self.part // 4) if self.bits == 8 else 4

    @property
    def channels(self) -> tuple[tuple[str, int], ...]:
        """The channels as factors."""
        return ("j", PIECE // (4 * self.vector)), ("c", 4), ("x", self.vector)

    def registers(self, plane: tuple[int, int, int]) -> Registers:
        """Where a plane [4, rows, 64] goes."""
        bits, start, stop = plane
        unit = (("warp", UNITS),)
        if bits == 8:
            return Registers((unit, self.order.rows_of_bytes, self.channels), ("warp",), ("q", "rho", "c"))
        rows = stop - start  # n, or 1 that serves all
        return Registers((unit, (("rho", rows),), self.channels), ("warp",), (8 // rows, "rho", "c"))

    def scales(self, num_groups: int) -> Registers:
        """Where scales per channel [num_groups, 64] of a tile go."""
        return Registers(((("group", num_groups),), self.channels), ("group", UNITS // num_groups), (8, "c"))

    def columns(self, x: jax.Array) -> jax.Array:
        """Bring channels [..., D], in pieces, into the order of columns."""
        parts = x.reshape(-1, PIECE // (4 * self.vector), 4, self.vector // 4, 2, 2)  # j, c, step, h, e
        return parts.transpose(0, 1, 3, 4, 2, 5).reshape(x.shape)

    def decode(self, words: jax.Array) -> jax.Array:
        """Codes of [4, rows, 64] as `pairs` must place them: [128, 64]."""
        return self.columns(self.order.arrange(unpack(words.reshape(-1, PIECE), self.bits)))

    def pairs(self, words: list, lane: Any) -> Iterator[tuple]:
        """The operand register by register: its index (m, block of 8 columns, b), j, x, and two codes in halves.

        The codes are of channels (j, c, x) and (j, c, x + 1).

        Args:
          words: For each plane an array of words, [*held_shape, words of a vector].
          lane: Thread in its warp.
        """
        n = self.order.n
        q, rho = (lane >> 2) // n, (lane >> 2) % n
        for block in range(PIECE // 8):
            j, x = divmod(2 * block, self.vector)
            if self.bits == 8:
                for m, b in _ROWS:
                    word = words[0][m, b, j, x // 4]
                    yield (m, block, b), j, x, word.permute(word, _bytes(x % 4, x % 4 + 1))
                continue
            halves = [
                _spread(bits, plane[j, x], plane[j, x + 1], q, rho)
                for (bits, _, _), plane in zip(planes(self.bits), words, strict=True)
            ]
            for m, b in _ROWS:
                yield (m, block, b), j, x, _field(self.bits, halves, m, b)


@dataclasses.dataclass(frozen=True)
class Values:
    """Values as a left operand, transposed: rows are channels, columns tokens in the rows' order of logits."""

    bits: int
    order: Order

    @property
    def channels(self) -> tuple[tuple[str, int], ...]:
        """The channels as factors: a thread takes adjacent ones."""
        return ("warp", 4), ("r", 8), ("x", 2)

    def registers(self, plane: tuple[int, int, int]) -> Registers:
        """Where a plane [4, rows, 64] goes."""
        bits, start, stop = plane
        unit, n = (("unit", UNITS),), self.order.n
        rows: tuple[tuple[str, int], ...] = (("hi", n // 2), ("e", 2))
        if bits == 8:
            return Registers((unit, rows + self.order.rows_of_bytes[1:], self.channels), ("warp",), ("r", "q", "hi"))
        if stop - start < n:
            rows = rows[:1]  # both tokens of a pair are in one word
        return Registers((unit, rows, self.channels), ("warp",), ("r", 8 // n, "hi"))

    def scales(self, num_groups: int) -> Registers:
        """Where scales per channel [num_groups, 64] of a tile go."""
        return Registers(((("group", num_groups),), self.channels), ("warp",), ("r", 4))

    def channel(self, row: Any) -> Any:
        """Channel at a row; integers or arrays of them."""
        warp, b, r = row // 16, row // 8 % 2, row % 8
        return 16 * warp + 2 * r + b

    def rows(self, x: jax.Array) -> jax.Array:
        """Bring channels [64, ...] into the order of rows."""
        return x.reshape(4, 8, 2, -1).swapaxes(1, 2).reshape(x.shape)

    def channels_of(self, x: jax.Array) -> jax.Array:
        """Undo `rows`, along the last axis and in pieces: [..., D]."""
        return x.reshape(-1, 2, 8).swapaxes(1, 2).reshape(x.shape)

    def decode(self, words: jax.Array) -> jax.Array:
        """Codes of [4, rows, 64] as `pairs` must place them: [64, 128]."""
        return self.rows(self.order.arrange(unpack(words.reshape(-1, PIECE), self.bits)).T)

    def pairs(self, words: list, lane: Any) -> Iterator[tuple]:
        """The operand register by register: its index (m, block of 8 columns, b), unit, x, and two codes in halves.

        The codes are of channel (warp, r, x) and two tokens of the unit. For arguments see `Keys.pairs`.
        """
        n = self.order.n
        q = (lane & 3) // (n // 2)
        for unit in range(UNITS):
            for x in range(2):
                if self.bits == 8:
                    for m, b in _ROWS:
                        first, second = (words[0][unit, e, m, b, 0] for e in range(2))
                        yield _of_values(m, b, unit, x), unit, x, first.permute(second, _bytes(x, x))
                    continue
                halves = []
                for (bits, start, stop), plane in zip(planes(self.bits), words, strict=True):
                    if stop - start == n:
                        halves.append(_spread(bits, plane[unit, 0, x], plane[unit, 1, x], q, None))
                    else:
                        halves.append(plane[unit, x] >> (q * (2 * bits)))
                for m, b in _ROWS:
                    yield _of_values(m, b, unit, x), unit, x, _field(self.bits, halves, m, b)


def _of_values(m: int, b: int, unit: int, x: int) -> tuple[int, int, int]:
    """Register of the operand of values that holds rows (m, b) of logits, as columns, for a thread's channel x."""
    return 0, 2 * (4 * m + unit) + b, x


def _bytes(first: int, second: int) -> int:
    """Permutation that puts a byte of each of two words at the foot of a half."""
    return first | first << 4 | (4 + second) << 8 | (4 + second) << 12


def _spread(bits: int, first: Any, second: Any, q: Any, rho: Any) -> Any:
    """Bring a thread's tokens of two words into halves: the code of (m, b) at bit `8 m + bits * b` of each."""
    if bits == 4:
        return first.permute(second, q * 0x1111 + 0x6420)
    if bits == 2:
        return first.permute(second, (q >> 1) * 0x1111 + 0x6420) >> ((q & 1) * 4)
    return first.permute(second, rho * 0x2222 + 0x5410) >> (q * 2)


def _field(bits: int, halves: list, m: int, b: int) -> Any:
    """The codes of rows (m, b), their planes put together."""
    code, low = None, 0
    for (width, _, _), word in zip(planes(bits), halves, strict=True):
        part = (word >> (8 * m + width * b)) & ((2**width - 1) * 0x10001)
        code = part if code is None else code | (part << low)
        low += width
    return code
