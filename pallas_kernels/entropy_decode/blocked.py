"""Decode attention over entropy-coded rows in plain JAX: a block is decoded, multiplied and forgotten.

With few queries, symbols of streams are multiplied step by step as they are decoded, in all heads and streams at once.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.entropy_decode.block_sizes import BLOCKED
from pallas_kernels.entropy_decode.rows import RowFormat, Rows, dot, mix, num_slots
from pallas_kernels.prefill.reference import capped
from pallas_kernels.quantized_decode.reference import live_slots
from pallas_kernels.softmax_state import State, unit, update


def entropy_decode(
    q: jax.Array,
    k: Rows,
    v: Rows,
    k_lengths: jax.Array | None,
    v_lengths: jax.Array | None,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    k_format: RowFormat,
    v_format: RowFormat,
    soft_cap: float | None,
    sliding_window: int | None,
) -> State:
    """See `api.entropy_decode`."""
    q = q.astype(jnp.float32)
    slots, together = num_slots(k, k_format), math.lcm(k_format.block, v_format.block)
    size = min(slots, max(BLOCKED // together, 1) * together)

    def step(j: jax.Array, state: State) -> State:
        first = jnp.minimum(j * size, slots - size)  # the last block is moved back to end at S
        here = None if pos is None else lax.dynamic_slice_in_dim(pos, first, size, 2)
        slot = first + jnp.arange(size)
        live = live_slots(length, here, q_pos, slot, sliding_window) & (slot >= j * size)[None, None, None]
        logits = capped(dot(q, _cut(k, first, size, slots), k_lengths, k_format), soft_cap)
        values = _cut(v, first, size, slots)
        return update(state, logits, live, lambda p: mix(p, values, v_lengths, v_format))

    num_blocks = (jnp.minimum(length.max(), slots) + size - 1) // size
    return lax.fori_loop(0, num_blocks, step, unit(q.shape))


def _cut(x: Any, first: jax.Array, size: int, slots: int) -> Any:
    """Slots first .. first + size of arrays [B, K, rows, ...] whose rows stand for `slots` slots."""

    def one(a: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(a, first * a.shape[2] // slots, size * a.shape[2] // slots, 2)

    return jax.tree.map(one, x)
