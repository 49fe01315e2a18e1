"""Tuned sizes of the kernels, by device and shape."""

import dataclasses

KEY_CHANNELS = VALUE_CHANNELS = 64  # that the Triton kernel works on at a time
_PROGRAMS = 2 * 132 * 8  # two waves of programs on an H200: its processors times the programs that fit one


@dataclasses.dataclass(frozen=True)
class GpuSizes:
    """How the Triton kernel cuts a call: `splits` ranges of `tiles` tiles, `words` words high; `rows` queries each."""

    splits: int
    tiles: int
    words: int
    rows: int
    num_warps: int
    num_stages: int


def gpu_sizes(heads: int, slots: int, rows: int, places: int) -> GpuSizes:
    """Sizes for `heads` rows times KV heads; a word holds `places` slots."""
    words = 16 if places > 1 else 32
    tiles = -(-slots // (words * places))
    splits = max(1, min(tiles // 2, _PROGRAMS // heads))
    tiles_of_split = -(-tiles // splits)
    padded = 8 if rows <= 8 else 16
    return GpuSizes(-(-tiles // tiles_of_split), tiles_of_split, words, padded, num_warps=1, num_stages=2)
