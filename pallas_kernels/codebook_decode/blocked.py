"""Decode attention over codes of non-uniform levels in plain JAX: a block is decoded, used and forgotten."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.codebook_decode.block_sizes import BLOCKED
from pallas_kernels.codebook_decode.rows import CodebookRows, decoded
from pallas_kernels.packing import pack_unit
from pallas_kernels.prefill.reference import capped
from pallas_kernels.quantized_decode.reference import live_slots
from pallas_kernels.softmax_state import State, unit, update


def codebook_decode(
    q: jax.Array,
    k: CodebookRows,
    v: CodebookRows,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    soft_cap: float | None,
    sliding_window: int | None,
) -> State:
    """See `api.codebook_decode`."""
    q, heads, slots = q.astype(jnp.float32), q.shape[1], k.num_slots
    size = min(slots, math.lcm(BLOCKED, pack_unit(k.bits), pack_unit(v.bits)))

    def step(j: jax.Array, state: State) -> State:
        first = jnp.minimum(j * size, slots - size)  # the last block is moved back to end at S
        slot = first + jnp.arange(size)
        here = None if pos is None else lax.dynamic_slice_in_dim(pos, first, size, 2)
        live = live_slots(length, here, q_pos, slot, sliding_window) & (slot >= j * size)[None, None, None]
        keys = decoded(k.cut(first, size), heads, here)
        logits = jnp.einsum("bksd,bkrd->bksr", keys, q).swapaxes(2, 3)  # keys on the left: a quarter faster on CPU
        values = decoded(v.cut(first, size), heads, None)
        return update(state, capped(logits, soft_cap), live, lambda p: jnp.einsum("bkrs,bksd->bkrd", p, values))

    num_blocks = (jnp.minimum(length.max(), slots) + size - 1) // size
    return lax.fori_loop(0, num_blocks, step, unit(q.shape))
