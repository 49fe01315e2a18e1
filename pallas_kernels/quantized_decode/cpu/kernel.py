"""Decode attention of one row, KV head and share of its slots, compiled by Numba for one configuration.

Online softmax over blocks of slots, as every other backend. A block's products are integer tiles (`tiles`): scales
fold into q and p before these are rounded to 16 bits, each with a step of its own per row and group, and zero points
enter by one product a group. What remains is linear in slots or channels alone, and LLVM vectorises it.
"""

from collections.abc import Callable

import numpy as np
from numba import types

from pallas_kernels.quantized_decode.cpu.keys import make_keys
from pallas_kernels.quantized_decode.cpu.plan import Plan
from pallas_kernels.quantized_decode.cpu.rows import make_head
from pallas_kernels.quantized_decode.cpu.softmax import DEAD, make_softmax
from pallas_kernels.quantized_decode.cpu.values import make_values
from pallas_kernels.xla_cpu import argument, argument_size, free, malloc, pointer, result, result_size


def make_run(plan: Plan) -> Callable:
    """Make one task of a custom call, for `xla_cpu.register`: operands and results as `call` passes them."""
    rows, head_dim, value_dim, block, layout = plan.rows, plan.head_dim, plan.value_dim, plan.block, plan.layout
    slots_per_word = 1 if plan.k_format.bits == 8 else 32
    words_per_slot = 1 if plan.k_format.bits == 8 else plan.k_format.bits
    (begin, logits), softmax, add = make_keys(plan), make_softmax(plan), make_values(plan)
    k_head, v_head = make_head(plan.k_format, head_dim), make_head(plan.v_format, value_dim)

    def run(frame, task):
        num_heads, num_splits = result_size(frame, 0, 1), result_size(frame, 0, 2)
        head, row = task // num_splits, task // (num_splits * num_heads)
        num_slots = argument_size(frame, 1, 2) * slots_per_word // words_per_slot
        q = pointer(argument(frame, 0) + 4 * head * rows * head_dim, types.float32)
        k, v = k_head(frame, 1, head, num_slots), v_head(frame, 4, head, num_slots)
        length = pointer(argument(frame, 7), types.int32)[row]
        pos_head = head if argument_size(frame, 8, 1) > 1 else row
        pos = argument(frame, 8) + 4 * pos_head * num_slots
        q_pos = pointer(argument(frame, 9) + 4 * row * rows, types.int32)
        acc = pointer(result(frame, 0) + 4 * task * rows * value_dim, types.float32)
        top = pointer(result(frame, 1) + 4 * task * rows, types.float32)
        total = pointer(result(frame, 2) + 4 * task * rows, types.float32)
        for r in range(rows):
            top[r] = DEAD
            total[r] = np.float32(0)
        for i in range(rows * value_dim):
            acc[i] = np.float32(0)

        live = length if length < num_slots else num_slots
        share = -(-live // (num_splits * block)) * block
        first = task % num_splits * share
        last = first + share if first + share < live else live
        memory = malloc(layout.end)
        p = pointer(memory + layout.p, types.float32)
        begin(q, memory)
        for start in range(first, last, block):
            count = block if start + block < last else last - start
            logits(q, k, start, count, num_slots, memory, p)
            softmax(p, count, pos + 4 * start, q_pos, acc, top, total)
            add(p, v, start, count, num_slots, memory, acc)
        free(memory)

    return run
