"""How one head's quantised rows are read on CPU: addresses, the last unit, and metadata as float32."""

from collections.abc import Callable

import numpy as np
from numba import njit, types

from pallas_kernels.formats import Format
from pallas_kernels.quantized_decode.cpu.tiles import copy_bytes, larger, nearest, unit, widen
from pallas_kernels.xla_cpu import argument, pointer

inlined = njit(inline="always")


def make_head(fmt: Format, dim: int) -> Callable:
    """Make `head(frame, operand, head, num_slots)`: addresses of a head's codes, scale and zero point."""
    size, group, slot_bits = _metadata(fmt).bitwidth // 8, fmt.group_size, fmt.bits * dim

    @inlined
    def head(frame, operand, head, num_slots):
        at = head * (num_slots * dim // group) * size
        codes = argument(frame, operand) + head * (num_slots * slot_bits // 8)
        return codes, argument(frame, operand + 1) + at, argument(frame, operand + 2) + at

    return head


def make_affine(fmt: Format, stride: int, longest: int) -> Callable:
    """Make `affine(out, scale, zero_point, first, count)`: fill out f32[2, longest] with both of every stride-th group.

    scale, zero_point: addresses of a head's.
    """
    kind, wide = _metadata(fmt), widen(fmt.metadata_dtype)
    size, symmetric, half = kind.bitwidth // 8, fmt.symmetric, np.float32(fmt.num_levels // 2)

    @inlined
    def affine(out, scale, zero_point, first, count):
        scales, zero_points = pointer(scale + first * size, kind), pointer(zero_point + first * size, kind)
        for i in range(count):
            s = wide(scales[i * stride])
            out[i] = s
            out[longest + i] = -s * half if symmetric else wide(zero_points[i * stride])

    return affine


def make_stage(fmt: Format, dim: int) -> Callable:
    """Make `stage(codes, start, count, num_slots, spare)`: address of the units that hold slots [start, start + count).

    Where the last unit reaches beyond the cache, the rows are copied to `spare`, what it lacks being left as it is.
    """
    tokens, slot_bits = unit(fmt.bits), fmt.bits * dim

    @inlined
    def stage(codes, start, count, num_slots, spare):
        here = codes + start * slot_bits // 8
        if start + (count + tokens - 1) // tokens * tokens > num_slots:
            copy_bytes(here, spare, (num_slots - start) * slot_bits // 8)
            here = spare
        return here

    return stage


def make_rounding(bits: int, terms: int) -> Callable:
    """Make `round_line(line, count)`: replace x, at most `terms` long, by whole numbers y of 16 bits.

    Returns (step, rest): sum(x * codes) ~ step * sum(y * codes) + rest. The rest is what all y together lost, times the
    middle code; with it rounding errors are weighted by distances from the middle, half of what codes are.
    """
    largest = np.float32(min(32767, (2**31 - 1) // (terms * (2**bits - 1))))  # products' sums fit 32 bits
    middle = np.float32((2**bits - 1) / 2)

    @inlined
    def round_line(line, count):
        top, total, rounded = np.float32(0), np.float32(0), np.float32(0)
        for i in range(count):
            top = larger(top, abs(line[i]))
            total += line[i]
        step = top / largest
        inverse = largest / top if top > np.float32(1e-30) else np.float32(0)
        for i in range(count):
            line[i] = nearest(line[i] * inverse)
            rounded += line[i]
        return step, middle * (total - step * rounded)

    return round_line


def _metadata(fmt: Format) -> types.Type:
    return types.float32 if fmt.metadata_dtype == "float32" else types.uint16
