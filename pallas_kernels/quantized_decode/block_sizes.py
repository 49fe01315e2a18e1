"""Tuned sizes of the kernels, by device and shape."""

_H200_PROCESSORS = 132
_HOPPER_BLOCKS = 3 * _H200_PROCESSORS  # blocks of one warpgroup that run at a time
HOPPER_STAGES = 3  # tiles in flight


def hopper_splits(programs: int, tiles: int) -> int:
    """Ranges of slots so that `programs` of each fill the device; a range has two tiles or more."""
    return max(1, min(_HOPPER_BLOCKS // programs, tiles // 2))
