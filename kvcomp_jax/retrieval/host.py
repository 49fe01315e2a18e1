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

FETCHED = 32  # tokens of a list that one transfer brings: few transfers if much is missing, small ones if little is


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


def fetch_into(
    pool: Any, rows: Any, page: jax.Array, slot: jax.Array, *, num_pages: int, num_slots: int, page_size: int
) -> Any:
    """Bring pages of rows in host memory to a pool on the device.

    `FETCHED` tokens at a time, as often as the row and head that misses most needs: what is at hand does not move.

    Args:
      pool: Arrays [B, K * G, ...] of `num_slots` pages: G lists of pages for each of the K heads of `rows`.
      rows: Arrays [B, K, ...] of `num_pages` pages.
      page: i32[B, K * G, n], -1 = none; none before others.
      slot: i32[B, K * G, n], where each goes; beyond the last for none.
      page_size: Tokens.
    """
    at_once = min(max(FETCHED // page_size, 1), page.shape[2])
    rest = ((0, 0), (0, 0), (0, -page.shape[2] % at_once))
    page, slot = jnp.pad(page, rest, constant_values=-1), jnp.pad(slot, rest, constant_values=num_slots)

    def bring(rows: jax.Array, pool: jax.Array, page: jax.Array) -> jax.Array:
        batch, heads, *_ = rows.shape
        found = fetch(rows, page[:, : pool.shape[1]].reshape(batch, heads, -1), num_pages)
        return found.reshape(batch, pool.shape[1], -1, *found.shape[3:])

    def body(i: jax.Array, pool: Any) -> Any:
        mine, at = (lax.dynamic_slice_in_dim(x, i * at_once, at_once, 2) for x in (page, slot))
        new = jax.tree.map(lambda x, y: bring(x, y, jnp.maximum(mine, 0)), rows, pool)
        return put(pool, at, new, num_slots)

    num = (page >= 0).sum(-1).max()
    return lax.fori_loop(0, (num + at_once - 1) // at_once, body, pool)


def _flat(page: jax.Array, num_pages: int) -> jax.Array:
    """Where page i32[B, K, n] stands among all pages of all rows and heads."""
    batch, heads, _ = page.shape
    line = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1)
    return line * num_pages + page
