"""Decode attention over codes of non-uniform levels in plain JAX: a block is decoded, used and forgotten."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import fold_blocks
from pallas_kernels.codebook_decode.block_sizes import BLOCKED
from pallas_kernels.codebook_decode.rows import CodebookRows, Stored, decoded
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

    def cut(j: jax.Array) -> tuple[Stored, Stored, jax.Array | None]:
        first = jnp.minimum(j * size, slots - size)  # the last block is moved back to end at S
        here = None if pos is None else lax.dynamic_slice_in_dim(pos, first, size, 2)
        return k.cut(first, size), v.cut(first, size), here

    def step(j: jax.Array, block: tuple[Stored, Stored, jax.Array | None], state: State) -> State:
        keys, values, here = block
        slot = jnp.minimum(j * size, slots - size) + jnp.arange(size)
        live = live_slots(length, here, q_pos, slot, sliding_window) & (slot >= j * size)[None, None, None]
        rows = decoded(k.with_stored(keys), heads, here)
        logits = jnp.einsum("bksd,bkrd->bksr", rows, q).swapaxes(2, 3)  # keys on the left: a quarter faster on CPU
        mixed = decoded(v.with_stored(values), heads, None)
        return update(state, capped(logits, soft_cap), live, lambda p: jnp.einsum("bkrs,bksd->bkrd", p, mixed))

    num_blocks = (jnp.minimum(length.max(), slots) + size - 1) // size
    ahead = k.rope is not None or 3 in (k.bits, v.bits)
    return fold_blocks(num_blocks, cut, step, unit(q.shape), ahead=ahead)
