"""Products on tensor cores in Triton that keep what float32 has.

Tensor cores read 11 of a float32's 24 bits. Triton's own three products ("tf32x3") split both operands in every
call and look for what is not finite in each: more than a third of the instructions of a loop over 4-bit codes, and
registers for low parts that codes do not have.
"""

import triton
import triton.language as tl


@triton.jit
def precise_dot(a, b, acc=None):
    """acc + a b in float32, for operands of one type, or a in bfloat16 and b in float32.

    Of two in float32 low parts times low parts are left out, 2**-22 of the product.
    """
    if a.dtype == b.dtype and b.dtype != tl.float32:
        return tl.dot(a, b, acc)
    elif a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        acc = tl.dot(a, (rest - middle.to(tl.float32)).to(tl.bfloat16), acc)
        acc = tl.dot(a, middle, acc)
        return tl.dot(a, high, acc)
    else:
        a_high, b_high = _high(a), _high(b)
        acc = tl.dot(a - a_high, b_high, acc, input_precision="tf32")
        acc = tl.dot(a_high, b - b_high, acc, input_precision="tf32")
        return tl.dot(a_high, b_high, acc, input_precision="tf32")


@triton.jit
def _high(x):
    """The part of float32 that tensor cores read."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
