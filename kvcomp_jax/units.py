"""Units of tokens in arrays [B, K or 1, rows, ...] whose rows are proportional to tokens."""

from typing import Any

import jax
import jax.numpy as jnp


def take(rows: Any, index: jax.Array, num_units: int) -> Any:
    """Gather units index i32[B, K, n] of arrays [B, K, rows, ...] that hold `num_units`; out of range is clipped.

    Arrays of one head, shared by all, go by the first head's index.
    """

    def one(x: jax.Array) -> jax.Array:
        x = by_unit(x, num_units)
        here = index[:, : x.shape[1]]
        where = here.reshape(*here.shape, *(1,) * (x.ndim - 3))
        x = jnp.take_along_axis(x, where, 2, mode="clip")
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    return jax.tree.map(one, rows)


def put(rows: Any, index: jax.Array, new: Any, num_units: int) -> Any:
    """Write units of `new` at index i32[B, K, n]; out of range is dropped. Heads as in `take`."""
    b = jnp.arange(index.shape[0])[:, None, None]

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        h = jnp.arange(x.shape[1])[None, :, None]
        y = by_unit(y, index.shape[2]).astype(x.dtype)
        return by_unit(x, num_units).at[b, h, index[:, : x.shape[1]]].set(y, mode="drop").reshape(x.shape)

    return jax.tree.map(one, rows, new)


def by_unit(x: jax.Array, num_units: int) -> jax.Array:
    """[B, K, rows, ...] -> [B, K, units, rows / units, ...]."""
    return x.reshape(*x.shape[:2], num_units, x.shape[2] // num_units, *x.shape[3:])
