"""Tuned sizes of the kernels, by device, in tokens."""

import math

BLOCKED = 512  # 768 streams of 128 symbols for 3 heads of 64 channels: wide steps, and everything stays in cache

_PROGRAMS = 4 * 132 * 4  # four waves of programs on an H200: its processors times the programs that fit one


def gpu_splits(heads: int, slots: int, *blocks: int) -> tuple[int, int]:
    """Splits and their slots, whole units of all `blocks`, for `heads` rows times KV heads in the Triton kernels."""
    unit = math.lcm(*blocks)
    units = -(-slots // unit)
    units_of_split = -(-units // max(1, min(units, _PROGRAMS // heads)))
    return -(-units // units_of_split), units_of_split * unit


_TPU_CHAINS = 4  # groups of eight units decoded side by side: a look-up's result is long in coming


def tpu_sizes(slots: int, unit: int) -> tuple[int, int]:
    """Tokens in memory and at work in the TPU kernel: 128 units, which may lie along lanes; a few times eight of them.

    A `unit` here is a whole number of units of either side.
    """
    chains = 1
    while chains < _TPU_CHAINS and 8 * unit * chains < slots:
        chains *= 2
    return 128 * unit, 8 * unit * chains
