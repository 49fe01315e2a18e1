"""Logits of a block of slots to probabilities, and the running state of online softmax, on CPU."""

from collections.abc import Callable

import numpy as np
from numba import njit, types

from pallas_kernels.prefill.reference import MASK_VALUE
from pallas_kernels.quantized_decode.cpu.plan import Plan
from pallas_kernels.quantized_decode.cpu.rows import inlined
from pallas_kernels.quantized_decode.cpu.tiles import larger
from pallas_kernels.xla_cpu import float_from_bits, pointer

DEAD = np.float32(MASK_VALUE)


def make_softmax(plan: Plan) -> Callable:
    """Make `softmax(p, count, pos, q_pos, acc, top, total)`: logits to probabilities in place; scale down the state.

    p f32[R, P], acc f32[R, D], top and total f32[R], q_pos i32[R] are pointers; pos is the address of the block's.
    """
    rows, dim, block, prepare = plan.rows, plan.value_dim, plan.block, _make_masking(plan)

    @inlined
    def softmax(p, count, pos, q_pos, acc, top, total):
        for r in range(rows):
            prepare(p, r, count, pos, q_pos)
            new_top = top[r]
            for t in range(count):
                new_top = larger(new_top, p[r * block + t])
            added = np.float32(0)
            for t in range(count):
                e = exp(p[r * block + t] - new_top) if p[r * block + t] > DEAD else np.float32(0)
                p[r * block + t] = e
                added += e
            keep = exp(top[r] - new_top)
            for d in range(dim):
                acc[r * dim + d] *= keep
            total[r] = total[r] * keep + added
            top[r] = new_top

    return softmax


def _make_masking(plan: Plan) -> Callable:
    """Make `prepare(p, r, count, pos, q_pos)`: cap a row of logits, and mask slots that the query does not see."""
    block, capped, cap = plan.block, plan.soft_cap is not None, np.float32(plan.soft_cap or 1)
    window = np.int32(2**31 - 1 if plan.sliding_window is None else plan.sliding_window)
    one, two = np.float32(1), np.float32(2)

    @inlined
    def squash(p, r, count):
        for t in range(count):
            p[r * block + t] = cap * (one - two / (exp(two / cap * p[r * block + t]) + one))

    @inlined
    def mask(p, r, count, pos, q_pos):
        here, at = pointer(pos, types.int32), q_pos[r]
        for t in range(count):
            if here[t] < 0 or here[t] > at or at - here[t] >= window:
                p[r * block + t] = DEAD

    @inlined
    def nothing(p, r, count, pos, q_pos):
        pass

    @inlined
    def squash_and_mask(p, r, count, pos, q_pos):
        squash(p, r, count)
        last(p, r, count, pos, q_pos)

    last = mask if plan.positions else nothing
    return squash_and_mask if capped else last


@njit(fastmath={"contract", "nsz"}, error_model="numpy")
def exp(x):
    """e to the power of x, to float32's precision; the smallest normal number where it would be less.

    Source: Cephes, Moshier 1992, `expf`.
    """
    x = -larger(-larger(x, np.float32(-87)), np.float32(-87))
    n = np.int32(x * np.float32(1.44269504) + np.float32(127.5))
    f = np.float32(n - np.int32(127))
    r = x - f * np.float32(0.693359375) - f * np.float32(-2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    return (y * r * r + r + np.float32(1)) * float_from_bits(np.int32(n << np.int32(23)))
