"""What a CPU kernel is compiled for, and the memory that one task of it takes."""

import dataclasses
import itertools
import math
from typing import NamedTuple

from pallas_kernels.formats import Format
from pallas_kernels.quantized_decode.block_sizes import CPU


class Layout(NamedTuple):
    """Where the parts of a task's memory begin, in bytes; float32 but q16, p16 and spare, which only tiles read."""

    p: int  # [padded_rows, block], logits and then probabilities
    raw_logits: int  # [padded_rows, block]
    raw_values: int  # [padded_rows, value_dim]
    q16: int
    p16: int
    spare: int  # a copied unit
    q_step: int  # [groups of a key, rows], what rounding q gave
    q_rest: int
    q_sum: int
    p_step: int  # [rows], what rounding p gave
    p_rest: int
    p_sum: int
    meta: int  # [2, longest], scales and zero points
    line: int  # [longest]
    end: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call."""

    k_format: Format
    v_format: Format
    head_dim: int
    value_dim: int
    rows: int
    soft_cap: float | None
    positions: bool
    sliding_window: int | None

    @property
    def block(self) -> int:
        """Slots of a block."""
        return math.lcm(CPU, *(f.group_size for f in (self.k_format, self.v_format) if f.axis == "channel"))

    @property
    def chunk(self) -> int:
        """Query rows that share unpacked codes: at most 4, what registers hold."""
        return -(-self.rows // -(-self.rows // 4))

    @property
    def padded_rows(self) -> int:
        """Rows, with dead ones up to a whole number of chunks."""
        return -(-self.rows // self.chunk) * self.chunk

    @property
    def longest(self) -> int:
        """Floats of a line: slots of a block or channels."""
        return max(self.block, self.head_dim, self.value_dim)

    @property
    def layout(self) -> Layout:
        """Division of a task's memory."""
        rows, block, groups = self.padded_rows, self.block, max(1, self.head_dim // self.k_format.group_size)
        spare = block * max(self.k_format.bits * self.head_dim, self.v_format.bits * self.value_dim) // 32
        sizes = (rows * block, rows * block, rows * self.value_dim, rows * self.head_dim, rows * block, spare,
                 *(groups * rows,) * 3, *(rows,) * 3, 2 * self.longest, self.longest)  # fmt: skip
        return Layout(*itertools.accumulate((-(-size // 16) * 64 for size in sizes), initial=0))
