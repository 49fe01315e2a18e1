"""Tuned sizes of the kernels, by device and shape, in tokens.

Plain JAX on 2 cores, 4 bits, 16k slots, 8 KV heads, 4 queries each, processor milliseconds: blocks of 256 took 11.1,
512 took 8.4, 1024 took 8.8; a loop for each head 11.5. Full float32 attention took 18.0.
"""

import dataclasses
import math

from pallas_kernels.formats import Format
from pallas_kernels.tpu_rows import block_step

BLOCKED = 512
CPU = 256  # sums of 16-bit probabilities times 8-bit codes then just fit 32 bits

# Tokens fetched together: a step of the grid costs a few hundred cycles whatever its size, and a row's last block is
# fetched whole, so a block is also no more than a quarter of the slots.
_TPU_BLOCK, _TPU_LEAST_BLOCK = 8192, 2048
_TPU_TILE = 2048  # tokens of one step of online softmax: its latency is paid once a tile


def tpu_sizes(num_slots: int, *sides: tuple[int, Format | None], most: int = _TPU_BLOCK) -> tuple[int, int]:
    """Tokens of a block, at `most` if it can be, and of a tile, which divides it; both a whole number of groups.

    Args:
      sides: Last axis and format of the rows of K and V; no format is dense.
    """
    groups = [fmt.group_size for _, fmt in sides if fmt is not None and fmt.axis == "channel"]
    smallest = math.lcm(256, *groups)  # 256 tokens are 8 rows of registers of a plane of 1 bit
    tile = smallest * max(1, min(_TPU_TILE, num_slots, *(128 * g for g in groups)) // smallest)
    step = math.lcm(tile, *(block_step(dim, fmt) for dim, fmt in sides))
    block = min(most, max(_TPU_LEAST_BLOCK, num_slots // 4), num_slots)
    return step * max(1, block // step), tile


_PROGRAMS = 2 * 132 * 8  # two waves of programs on an H200: its processors times the programs that fit one


@dataclasses.dataclass(frozen=True)
class GpuSizes:
    """How the Triton kernel cuts a call: `splits` ranges of `tiles` tiles, `words` words high; `rows` queries each.

    `key_channels` and `value_channels` are those that it works on at a time, keys' in `key_cuts`, one for each warp
    that has no words of its own.
    """

    splits: int
    tiles: int
    words: int
    rows: int
    key_channels: int
    key_cuts: int
    value_channels: int
    num_warps: int
    num_stages: int


def gpu_sizes(heads: int, slots: int, rows: int, places: int, wide: bool) -> GpuSizes:
    """Sizes for `heads` rows times KV heads; a load holds `places` slots; `wide` queries are float32.

    A warp has the fewest instructions with a tile to itself; it is registers that run out.
    """
    words = 16 if places > 1 else 32
    num_warps = (2 if places > 1 else 1) * (2 if wide else 1)
    tiles = -(-slots // (words * places))
    splits = max(1, min(tiles // 2, _PROGRAMS // heads))
    tiles_of_split = -(-tiles // splits)
    padded = 8 if rows <= 8 else 16
    cuts = max(1, 16 * num_warps // words)
    return GpuSizes(-(-tiles // tiles_of_split), tiles_of_split, words, padded, 64 if wide else 64 * cuts, cuts, 64,
                    num_warps, num_stages=2)  # fmt: skip


_H200_PROCESSORS = 132
_HOPPER_BLOCKS = 3 * _H200_PROCESSORS  # blocks of one warpgroup that run at a time
HOPPER_STAGES = 3  # tiles in flight


def hopper_splits(programs: int, tiles: int) -> int:
    """Ranges of slots so that `programs` of each fill the device; a range has two tiles or more."""
    return max(1, min(_HOPPER_BLOCKS // programs, tiles // 2))
