"""Tuned sizes of the kernels, by device and shape."""

import dataclasses

_PROGRAMS = 132 * 8  # programs that keep an H200 busy: its processors times programs that fit one


@dataclasses.dataclass(frozen=True)
class GpuSizes:
    """How the Triton kernel cuts a call: `splits` ranges of `tiles` tiles of `block` slots; `rows` queries a program."""

    splits: int
    tiles: int
    block: int
    rows: int
    num_warps: int
    num_stages: int


def gpu_sizes(heads: int, slots: int, rows: int, dim: int, unit: int) -> GpuSizes:
    """Sizes for `heads` rows times KV heads; a tile is a multiple of `unit` slots."""
    block = max(64 if dim <= 128 else 32, unit)
    tiles = -(-slots // block)
    splits = max(1, min(tiles // 2, _PROGRAMS // heads))
    tiles_of_split = -(-tiles // splits)
    padded = 8 if rows <= 8 else 16
    return GpuSizes(-(-tiles // tiles_of_split), tiles_of_split, block, padded, num_warps=4, num_stages=2)
