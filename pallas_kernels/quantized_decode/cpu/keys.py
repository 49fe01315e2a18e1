"""Logits of a block of slots on CPU."""

from collections.abc import Callable

import numpy as np

from pallas_kernels.quantized_decode.cpu.plan import Plan
from pallas_kernels.quantized_decode.cpu.rows import inlined, make_affine, make_rounding, make_stage
from pallas_kernels.quantized_decode.cpu.tiles import LANES, key_tile, store_queries, unit, unit_bytes
from pallas_kernels.xla_cpu import floats


def make_keys(plan: Plan) -> tuple[Callable, Callable]:
    """Make `begin(q, memory)`, done once a task, and `logits(q, k, start, count, num_slots, memory, out)`.

    q: pointer to f32[R, D]. k: addresses of codes, scale and zero point. out: pointer to f32[R, P].
    """
    return (_per_token if plan.k_format.axis == "token" else _per_channel)(plan)


def _per_token(plan: Plan) -> tuple[Callable, Callable]:
    """logit = scale[t] * (q . codes[t]) + zero_point[t] * sum(q), summed over groups of channels."""
    fmt, dim, rows, block = plan.k_format, plan.head_dim, plan.rows, plan.block
    layout, longest, channel_bytes = plan.layout, plan.longest, 1 if fmt.bits == 8 else 4
    group, num_groups = fmt.group_size, dim // fmt.group_size
    round_line, products = make_rounding(fmt.bits, group), _make_products(plan)
    stage, affine = make_stage(fmt, dim), make_affine(fmt, num_groups, longest)

    @inlined
    def begin(q, memory):
        step, rest, sums = floats(memory + layout.q_step), floats(memory + layout.q_rest), floats(memory + layout.q_sum)
        line, q16 = floats(memory + layout.line), memory + layout.q16
        for g in range(num_groups):
            for r in range(rows):
                total = np.float32(0)
                for d in range(group):
                    line[d] = q[r * dim + g * group + d]
                    total += line[d]
                i = g * rows + r
                sums[i] = total
                step[i], rest[i] = round_line(line, group)
                for d in range(0, group, LANES):
                    store_queries(memory + layout.line + 4 * d, q16 + 4 * (r * dim + g * group + d))

    @inlined
    def logits(q, k, start, count, num_slots, memory, out):
        codes, scale, zero_point = k
        step, rest, sums = floats(memory + layout.q_step), floats(memory + layout.q_rest), floats(memory + layout.q_sum)
        meta, raw = floats(memory + layout.meta), floats(memory + layout.raw_logits)
        here = stage(codes, start, count, num_slots, memory + layout.spare)
        for g in range(num_groups):
            q16 = memory + layout.q16 + 4 * g * group
            products(here + channel_bytes * g * group, q16, count, group // LANES, memory + layout.raw_logits)
            affine(meta, scale, zero_point, start * num_groups + g, count)
            for r in range(rows):
                a, b, total = step[g * rows + r], rest[g * rows + r], sums[g * rows + r]
                for t in range(count):
                    x = (raw[r * block + t] * a + b) * meta[t] + meta[longest + t] * total
                    out[r * block + t] = x if g == 0 else out[r * block + t] + x

    return begin, logits


def _per_channel(plan: Plan) -> tuple[Callable, Callable]:
    """logit = (q * scale) . codes[t] + q . zero_point, for each group of tokens."""
    fmt, dim, rows, block = plan.k_format, plan.head_dim, plan.rows, plan.block
    layout, longest, group, slot_bits = plan.layout, plan.longest, fmt.group_size, fmt.bits * dim
    round_line, products = make_rounding(fmt.bits, dim), _make_products(plan)
    stage, affine = make_stage(fmt, dim), make_affine(fmt, 1, longest)

    @inlined
    def begin(q, memory):
        pass

    @inlined
    def logits(q, k, start, count, num_slots, memory, out):
        codes, scale, zero_point = k
        step, shift, line = floats(memory + layout.q_step), floats(memory + layout.q_sum), floats(memory + layout.line)
        meta, raw, q16 = floats(memory + layout.meta), floats(memory + layout.raw_logits), memory + layout.q16
        here = stage(codes, start, count, num_slots, memory + layout.spare)
        for first in range(0, count, group):
            affine(meta, scale, zero_point, (start + first) // group * dim, dim)
            for r in range(rows):
                total = np.float32(0)
                for d in range(dim):
                    line[d] = q[r * dim + d] * meta[d]
                    total += q[r * dim + d] * meta[longest + d]
                a, b = round_line(line, dim)
                step[r] = a
                shift[r] = total + b
                for d in range(0, dim, LANES):
                    store_queries(memory + layout.line + 4 * d, q16 + 4 * (r * dim + d))
            size = group if first + group < count else count - first
            target = memory + layout.raw_logits + 4 * first
            products(here + first * slot_bits // 8, q16, size, dim // LANES, target)
            for r in range(rows):
                for t in range(r * block + first, r * block + first + size):
                    out[t] = raw[t] * step[r] + shift[r]

    return begin, logits


def _make_products(plan: Plan) -> Callable:
    """Make `products(codes, q16, count, vectors, out)`: integer products of all queries with units of some slots."""
    bits, dim, chunk, padded, block = plan.k_format.bits, plan.head_dim, plan.chunk, plan.padded_rows, plan.block
    tile, tokens, size = key_tile(bits, chunk, dim), unit(bits), unit_bytes(bits, dim)

    @inlined
    def products(codes, q16, count, vectors, out):
        for i in range((count + tokens - 1) // tokens):
            for r in range(0, padded, chunk):
                tile(codes + i * size, q16 + 4 * r * dim, out + 4 * (r * block + i * tokens), 4 * block, vectors)

    return products
