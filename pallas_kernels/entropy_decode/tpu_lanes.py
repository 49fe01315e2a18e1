"""Lanes in both readers of the TPU kernel: units lie along sublanes, eight at a time, their words along lanes.

Mosaic picks lanes of one register by indices that differ in every place; a row of several registers is picked from one
by one, and the right result is kept.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu_rows import LANES, SUBLANES

EIGHT = (SUBLANES, LANES)


def lanes() -> jax.Array:
    """Number of each lane, i32[8, 128]."""
    return lax.broadcasted_iota(jnp.int32, EIGHT, 1)


def whole_lanes(width: int) -> int:
    """The next whole number of registers, in lanes."""
    return pl.cdiv(width, LANES) * LANES


def pick(registers: list[jax.Array], index: jax.Array, first: int = 0) -> jax.Array:
    """Elements `index` i32[n, 128] of rows of 32 bits that lie in registers [n, 128], the first of which is `first`."""
    within = index & (LANES - 1)
    picked = [jnp.take_along_axis(x, within, 1, mode="promise_in_bounds") for x in registers]
    found, which = picked[0], index >> 7
    for i, x in enumerate(picked[1:], first + 1):
        found = jnp.where(which == i, x, found)
    return found


def registers(ref, row, low: int, high: int) -> list[jax.Array]:
    """Registers that hold lanes low .. high of rows row .. row + 8, the first being `low // 128`."""
    rows = pl.ds(pl.multiple_of(row, SUBLANES), SUBLANES)
    return [ref[rows, i * LANES : (i + 1) * LANES] for i in range(low // LANES, high // LANES + 1)]


def before(x: jax.Array) -> jax.Array:
    """Sum of the lanes to the left, i32, for x i32[n, m] in 0 .. 256."""
    m = x.shape[1]
    earlier = lax.broadcasted_iota(jnp.int32, (m, m), 0) < lax.broadcasted_iota(jnp.int32, (m, m), 1)
    dims = (((1,), (0,)), ((), ()))
    sums = lax.dot_general(
        x.astype(jnp.float32).astype(jnp.bfloat16), earlier.astype(jnp.float32).astype(jnp.bfloat16), dims,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return sums.astype(jnp.int32)
