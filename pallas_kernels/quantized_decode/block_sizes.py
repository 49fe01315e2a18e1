"""Tuned sizes of the kernels, by device and shape."""

import math

from pallas_kernels.formats import Format

_TPU_BLOCK = 4096  # tokens fetched together: a step of the grid costs about as much as 300 kB of traffic
_TPU_TILE = 1024  # tokens of one step of online softmax


def tpu_sizes(num_slots: int, dim: int, k_format: Format, v_format: Format) -> tuple[int, int]:
    """Tokens of a block and of a tile, which divides it; both a whole number of groups.

    Blocks of packed rows and of metadata must be whole tiles of registers, whichever axis lies along lanes.
    """
    groups = [fmt.group_size for fmt in (k_format, v_format) if fmt.axis == "channel"]
    smallest = math.lcm(256, *groups)  # 8 rows of 3-bit words
    tile = smallest * max(1, min(_TPU_TILE, num_slots) // smallest)
    along_lanes = dim % 128 != 0
    lanes = [128 * 32 // math.gcd(fmt.bits, 32) for fmt in (k_format, v_format) if fmt.bits < 8]
    step = math.lcm(tile, *(g * (128 if along_lanes else 16) for g in groups), *(lanes if along_lanes else ()))
    return step * max(1, min(_TPU_BLOCK, num_slots) // step), tile
