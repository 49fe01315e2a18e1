"""Rows that stand in host memory: written there as they settle, and brought to the device page by page.

Both directions run inside `jit`, on the host, by `compute_on`. Where the host is the device, as on CPU, memory kinds
are names, and nothing moves.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.compute_on import compute_on

from kvcomp_jax.units import put


def to_host(tree: Any) -> Any:
    """Move arrays to pinned host memory."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def to_device(tree: Any) -> Any:
    """Move arrays to the memory of the device."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def fetch(rows: Any, page: jax.Array, num_pages: int) -> Any:
    """Gather pages i32[B, K, n], all >= 0, of rows in host memory, and bring them to the device; see `units.take`."""

    def one(x: jax.Array) -> jax.Array:
        batch, heads, *_ = x.shape
        index = to_host(_flat(page[:, :heads], num_pages).reshape(-1, 1))
        with compute_on("device_host"):
            lines = lax.reshape(x, (batch * heads * num_pages, x.size // (batch * heads * num_pages)))
            dimensions = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
            mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
            found = lax.gather(lines, index, dimensions, (1, lines.shape[1]), mode=mode)
        return to_device(found).reshape(batch, heads, -1, *x.shape[3:])

    return jax.tree.map(one, rows)


def store(rows: Any, page: jax.Array, new: Any, num_pages: int) -> Any:
    """Write pages of `new`, on the device, at i32[B, K, n] of rows in host memory; -1 is dropped; see `units.put`."""

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        batch, heads, *_ = x.shape
        here = page[:, :heads]
        index = jnp.where(here >= 0, _flat(here, num_pages), batch * heads * num_pages).reshape(-1, 1)
        index, y = to_host((index, y.astype(x.dtype).reshape(index.shape[0], -1)))
        with compute_on("device_host"):
            lines = lax.reshape(x, (batch * heads * num_pages, y.shape[1]))
            dimensions = lax.ScatterDimensionNumbers(
                update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
            )
            mode = lax.GatherScatterMode.FILL_OR_DROP
            return lax.reshape(lax.scatter(lines, index, y, dimensions, unique_indices=False, mode=mode), x.shape)

    return jax.tree.map(one, rows, new)


def fetch_into(pool: Any, rows: Any, page: jax.Array, slot: jax.Array, num_pages: int, num_slots: int) -> Any:
    """Bring pages i32[B, K, n], -1 = none, from the host to slots i32[B, K, n] of a pool of pages on the device.

    One at a time, as often as the row and head that misses most needs: what is at hand does not move.
    """

    def body(i: jax.Array, pool: Any) -> Any:
        mine, at = (lax.dynamic_slice_in_dim(x, i, 1, 2) for x in (page, slot))
        return put(pool, at, fetch(rows, jnp.maximum(mine, 0), num_pages), num_slots)

    return lax.fori_loop(0, (page >= 0).sum(-1).max(), body, pool)


def _flat(page: jax.Array, num_pages: int) -> jax.Array:
    """Where page i32[B, K, n] stands among all pages of all rows and heads."""
    batch, heads, _ = page.shape
    line = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1)
    return line * num_pages + page
