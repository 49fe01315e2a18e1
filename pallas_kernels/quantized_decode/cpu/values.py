"""Values of a block of slots, weighted by probabilities, on CPU."""

from collections.abc import Callable

import numpy as np

from pallas_kernels.quantized_decode.cpu.plan import Plan
from pallas_kernels.quantized_decode.cpu.rows import inlined, make_affine, make_rounding, make_stage
from pallas_kernels.quantized_decode.cpu.tiles import LANES, store_probabilities, unit, value_tile
from pallas_kernels.xla_cpu import address, floats


def make_values(plan: Plan) -> Callable:
    """Make `add(p, v, start, count, num_slots, memory, acc)`: acc f32[R, D] += p f32[R, P] @ V."""
    return (_per_token if plan.v_format.axis == "token" else _per_channel)(plan)


def _per_token(plan: Plan) -> Callable:
    """acc += (p * scale) @ codes + p . zero_point, for each group of channels."""
    fmt, dim, rows, block = plan.v_format, plan.value_dim, plan.rows, plan.block
    layout, longest, channel_bytes = plan.layout, plan.longest, 1 if fmt.bits == 8 else 4
    group, num_groups, tokens = fmt.group_size, dim // fmt.group_size, unit(fmt.bits)
    round_line, store_line, sums = make_rounding(fmt.bits, block), _make_storing(plan), _make_sums(plan)
    stage, affine = make_stage(fmt, dim), make_affine(fmt, num_groups, longest)

    @inlined
    def add(p, v, start, count, num_slots, memory, acc):
        codes, scale, zero_point = v
        step, shift, line = floats(memory + layout.p_step), floats(memory + layout.p_sum), floats(memory + layout.line)
        meta, raw, p16 = floats(memory + layout.meta), floats(memory + layout.raw_values), memory + layout.p16
        here = stage(codes, start, count, num_slots, memory + layout.spare)
        for g in range(num_groups):
            affine(meta, scale, zero_point, start * num_groups + g, count)
            for r in range(rows):
                total = np.float32(0)
                for t in range(count):
                    line[t] = p[r * block + t] * meta[t]
                    total += p[r * block + t] * meta[longest + t]
                a, b = round_line(line, count)
                step[r] = a
                shift[r] = total + b
                store_line(line, count, p16 + 2 * r * block)
            at = g * group
            units = (count + tokens - 1) // tokens
            sums(here + channel_bytes * at, p16, units, group // LANES, memory + layout.raw_values + 4 * at)
            for r in range(rows):
                for d in range(r * dim + at, r * dim + at + group):
                    acc[d] += raw[d] * step[r] + shift[r]

    return add


def _per_channel(plan: Plan) -> Callable:
    """acc += (p @ codes) * scale + sum(p) * zero_point, for each group of tokens."""
    fmt, dim, rows, block = plan.v_format, plan.value_dim, plan.rows, plan.block
    layout, longest, tokens = plan.layout, plan.longest, unit(fmt.bits)
    group, slot_bits = fmt.group_size, fmt.bits * dim
    round_line, store_line, sums = make_rounding(fmt.bits, group), _make_storing(plan), _make_sums(plan)
    stage, affine = make_stage(fmt, dim), make_affine(fmt, 1, longest)

    @inlined
    def add(p, v, start, count, num_slots, memory, acc):
        codes, scale, zero_point = v
        step, rest, total = (
            floats(memory + layout.p_step),
            floats(memory + layout.p_rest),
            floats(memory + layout.p_sum),
        )
        meta, raw, p16 = floats(memory + layout.meta), floats(memory + layout.raw_values), memory + layout.p16
        line = floats(memory + layout.line)
        here = stage(codes, start, count, num_slots, memory + layout.spare)
        for first in range(0, count, group):
            size = group if first + group < count else count - first
            affine(meta, scale, zero_point, (start + first) // group * dim, dim)
            for r in range(rows):
                added = np.float32(0)
                for t in range(size):
                    line[t] = p[r * block + first + t]
                    added += line[t]
                total[r] = added
                step[r], rest[r] = round_line(line, size)
                store_line(line, size, p16 + 2 * r * block)
            units = (size + tokens - 1) // tokens
            sums(here + first * slot_bits // 8, p16, units, dim // LANES, memory + layout.raw_values)
            for r in range(rows):
                a, b, c = step[r], rest[r], total[r]
                for d in range(dim):
                    acc[r * dim + d] += (raw[r * dim + d] * a + b) * meta[d] + meta[longest + d] * c

    return add


def _make_sums(plan: Plan) -> Callable:
    """Make `sums(codes, p16, units, vectors, out)`: sums over units of slots of 16 channels, `vectors` times."""
    bits, dim, chunk, padded, block = plan.v_format.bits, plan.value_dim, plan.chunk, plan.padded_rows, plan.block
    tile, vector_bytes = value_tile(bits, chunk, dim), LANES if bits == 8 else 4 * LANES

    @inlined
    def sums(codes, p16, units, vectors, out):
        for i in range(vectors):
            for r in range(0, padded, chunk):
                target = out + 4 * (r * dim + i * LANES)
                tile(codes + i * vector_bytes, p16 + 2 * r * block, target, 2 * block, units)

    return sums


def _make_storing(plan: Plan) -> Callable:
    """Make `store_line(line, count, target)`: store whole numbers for `value_tile`, zeros up to the end of a unit."""
    tokens, store_unit = unit(plan.v_format.bits), store_probabilities(plan.v_format.bits)

    @inlined
    def store_line(line, count, target):
        end = (count + tokens - 1) // tokens * tokens
        for t in range(count, end):
            line[t] = np.float32(0)
        for t in range(0, end, tokens):
            store_unit(address(line) + 4 * t, target + 2 * t)

    return store_line
