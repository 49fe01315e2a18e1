"""Scalar quantisation to a few sorted levels: the nearest one, and back; without gathers, which are slow on CPU."""

import jax
import jax.numpy as jnp
import numpy as np


def nearest(x: jax.Array, levels: np.ndarray) -> jax.Array:
    """Return u8 codes of the levels f32[n], ascending, n <= 256, that are nearest to x; of two equally near the lower.

    Counts the midpoints below x: n - 1 comparisons a value.
    """
    levels = np.asarray(levels, np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = jnp.zeros(x.shape, jnp.uint8)
    for middle in middles:
        codes += (x > middle).astype(jnp.uint8)
    return codes


def look_up(codes: jax.Array, levels: np.ndarray) -> jax.Array:
    """Return f32 levels[codes] for 2**bits levels.

    Halves the candidates with each bit of the code: 2**bits - 1 selections a value.
    """
    candidates = [jnp.float32(level) for level in np.asarray(levels, np.float32)]
    bit = 0
    while len(candidates) > 1:
        odd = (codes >> bit) & 1 != 0
        candidates = [jnp.where(odd, b, a) for a, b in zip(candidates[::2], candidates[1::2], strict=True)]
        bit += 1
    return jnp.broadcast_to(candidates[0], codes.shape)
