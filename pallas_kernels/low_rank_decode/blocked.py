"""Decode attention over low-rank coefficients in plain JAX, a head and a block of slots at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels import rows, softmax_state
from pallas_kernels.formats import Format
from pallas_kernels.prefill.reference import capped


def low_rank_decode(
    q: jax.Array,
    k: rows.Rows,
    v: rows.Rows,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    k_format: Format | None,
    v_format: Format | None,
    soft_cap: float | None,
    sliding_window: int | None,
) -> softmax_state.State:
    """See `api.low_rank_decode`."""
    slots = rows.num_slots(k, k_format)
    block = rows.block_size(slots, k_format, v_format)

    def one_head(b: jax.Array, h: jax.Array) -> softmax_state.State:
        queries = q[b, h].astype(jnp.float32)

        def step(first: jax.Array, live: jax.Array, state: softmax_state.State) -> softmax_state.State:
            keys, values = (
                rows.decoded(rows.cut(x, b, h, first, block, slots), fmt) for x, fmt in ((k, k_format), (v, v_format))
            )  # [P, r], [P, r']
            live = live & rows.cut_live(pos, q_pos, b, h, first, block, sliding_window)
            return softmax_state.update(state, capped(queries @ keys.T, soft_cap), live, lambda p: p @ values)

        unit = softmax_state.unit((q.shape[2], rows.dim(v)))
        return rows.fold_blocks(length[b], slots, block, step, unit)

    return rows.per_head(one_head, *q.shape[:2])
