"""How codes of variable length lie in memory: slots of fixed size, one a unit of tokens, filled as far as needed."""

import dataclasses
from typing import Literal, NamedTuple

import jax


class Streams(NamedTuple):
    """Rows as canonical prefix codes; x ~ codes * scale + zero_point.

    A unit is `block` tokens. Its codes are cut into streams that are decoded side by side; streams follow each other
    in the unit's words, each from the next whole byte, the first bit in the highest of its word.
    """

    words: jax.Array  # u32[*b, units, W]
    ends: jax.Array  # u8[*b, units, T], bytes of each stream
    choice: jax.Array  # u8[*b, units], which of the tables the unit uses; the last one is plain packing
    scale: jax.Array  # [*b, rows, cols], rows dividing the tokens and cols the channels
    zero_point: jax.Array  # as scale, in units of x


class Planes(NamedTuple):
    """Rows as packs of a few tokens of one channel, in as many bits as the pack's range takes; x as in `Streams`.

    Plane k of a pack is bit k of its codes less their minimum, one token a bit. Packs go by tokens, then channels.
    """

    planes: jax.Array  # u8, u16 or u32[*b, units, W], a plane an element: a bit for each token of a pack
    heads: jax.Array  # u8[*b, units, H], of all packs the bits of the minima, then of the numbers of planes
    scale: jax.Array  # as in Streams
    zero_point: jax.Array


@dataclasses.dataclass(frozen=True)
class StreamFormat:
    """What the arrays of `Streams` mean."""

    block: int  # tokens of a unit
    head_dim: int
    along: Literal["token", "channel"]  # symbols next to each other in a stream: a token's, or a channel's
    max_bits: int  # of a code
    plain_bits: int  # of a code in plain packing
    longest: int = 128  # symbols of a stream, at most unless a line is longer and cannot be cut

    @property
    def line(self) -> int:
        """Symbols of a token in a unit, or of a channel."""
        return self.head_dim if self.along == "token" else self.block

    @property
    def num_lines(self) -> int:
        """Tokens, or channels, of a unit."""
        return self.block if self.along == "token" else self.head_dim

    @property
    def pieces(self) -> int:
        """Streams that a line is cut into."""
        return next(n for n in range(1, self.line + 1) if self.line % n == 0 and self.line // n <= self.longest)

    @property
    def lines_together(self) -> int:
        """Lines that share a stream."""
        most = self.longest // self.line if self.pieces == 1 else 1
        return next(n for n in range(max(most, 1), 0, -1) if self.num_lines % n == 0)

    @property
    def stream(self) -> int:
        """Symbols of a stream."""
        return self.line // self.pieces * self.lines_together

    @property
    def num_streams(self) -> int:
        """Streams of a unit."""
        return self.block * self.head_dim // self.stream

    @property
    def plain_bytes(self) -> int:
        """Bytes of a unit in plain packing."""
        return self.num_streams * -(-self.stream * self.plain_bits // 8)


@dataclasses.dataclass(frozen=True)
class PlaneFormat:
    """What the arrays of `Planes` mean."""

    block: int  # tokens of a unit
    head_dim: int
    pack: int  # tokens of a pack: 8, 16 or 32
    code_bits: int  # of a code, and so of a minimum

    @property
    def width_bits(self) -> int:
        """Bits of a pack's number of planes, 0 .. code_bits."""
        return self.code_bits.bit_length()

    @property
    def num_packs(self) -> int:
        """Packs of a unit."""
        return self.block // self.pack * self.head_dim

    @property
    def head_bytes(self) -> int:
        """Bytes of a unit's minima and widths."""
        return self.num_packs * (self.code_bits + self.width_bits) // 8
