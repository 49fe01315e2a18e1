"""Tuned sizes of the kernels, by device."""

VALUE_CHANNELS = 32  # that the Triton kernel works on at a time; 64 spilled registers in one of the serving cases
NUM_WARPS = 2  # as above
_TILE = 64  # slots of a step of online softmax
_PROGRAMS = 4 * 132 * 4  # four waves of programs on an H200: its processors times the programs that fit one


def gpu_sizes(heads: int, slots: int, group_size: int) -> tuple[int, int, int]:
    """Slots of a tile, tiles of a split and splits, for `heads` rows times KV heads."""
    tile = max(_TILE, group_size)
    tiles = -(-slots // tile)
    tiles_of_split = -(-tiles // max(1, min(tiles // 2, _PROGRAMS // heads)))
    return tile, tiles_of_split, -(-tiles // tiles_of_split)
