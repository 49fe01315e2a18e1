"""Lanes in both readers of the TPU kernel: units lie along sublanes, eight at a time, their words along lanes."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu_rows import LANES, SUBLANES

EIGHT = (SUBLANES, LANES)


def lanes() -> jax.Array:
    """Number of each lane, i32[8, 128]."""
    return lax.broadcasted_iota(jnp.int32, EIGHT, 1)


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
