"""Tuned sizes of the kernels, by device, in slots and channels."""

import dataclasses

import jax

from pallas_kernels.codebook_decode.rows import CodebookRows
from pallas_kernels.formats import Format
from pallas_kernels.quantized_decode import block_sizes

BLOCKED = 512  # as in `quantized_decode`

_TILE = 32  # slots of a step of online softmax; 64 take twice the instructions a step, and all registers
_CHANNELS = 32  # that are decoded at a time: pairs of keys, channels of values
_PROGRAMS = 4 * 132 * 4  # four waves of programs on an H200: its processors times the programs that fit one


@dataclasses.dataclass(frozen=True)
class GpuSizes:
    """How the Triton kernel cuts a call: `splits` ranges of `tiles` tiles of `tile` slots, `rows` queries each."""

    splits: int
    tiles: int
    tile: int
    rows: int
    pairs: int
    channels: int
    num_warps: int


def gpu_sizes(heads: int, slots: int, rows: int, pairs: int, channels: int) -> GpuSizes:
    """Sizes for `heads` rows times KV heads whose keys have so many pairs, and values so many channels."""
    tiles = -(-slots // _TILE)
    tiles_of_split = -(-tiles // max(1, min(tiles // 2, _PROGRAMS // heads)))
    at_once = (min(_CHANNELS, max(16, _power_of_two(n))) for n in (pairs, channels))
    return GpuSizes(-(-tiles // tiles_of_split), tiles_of_split, _TILE, 8 if rows <= 8 else 16, *at_once, num_warps=4)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def tpu_sizes(q: jax.Array, k: CodebookRows, v: CodebookRows) -> tuple[int, int]:
    """Tokens of a block and of a tile, as for codes with a scale a token."""
    formats = [Format(x.bits, "token", q.shape[3]) for x in (k, v)]
    sides = [(x.codes.shape[3], fmt) for x, fmt in zip((k, v), formats, strict=True)]
    return block_sizes.tpu_sizes(k.num_slots, *sides)
