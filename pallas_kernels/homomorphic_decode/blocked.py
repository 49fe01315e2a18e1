"""Homomorphic decode attention in plain JAX, a head and a block of slots at a time."""

import jax

from pallas_kernels import rows, softmax_state
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.homomorphic_decode.products import dot, mix, rounded_queries
from pallas_kernels.prefill.reference import capped


def homomorphic_decode(
    q: jax.Array,
    k: Quantized,
    v: Quantized,
    k_sums: jax.Array,
    v_sums: jax.Array,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    k_format: Format,
    v_format: Format,
    soft_cap: float | None,
    sliding_window: int | None,
) -> softmax_state.State:
    """See `api.homomorphic_decode`."""
    slots = rows.num_slots(k, k_format)
    block = rows.block_size(slots, k_format, v_format)

    def one_head(b: jax.Array, h: jax.Array) -> softmax_state.State:
        queries = rounded_queries(q[b, h], k_format)

        def step(first: jax.Array, live: jax.Array, state: softmax_state.State) -> softmax_state.State:
            keys, values, ks, vs = (rows.cut(x, b, h, first, block, slots) for x in (k, v, k_sums, v_sums))
            logits = capped(dot(queries, keys, ks, k_format), soft_cap)
            live = live & rows.cut_live(pos, q_pos, b, h, first, block, sliding_window)
            return softmax_state.update(state, logits, live, lambda p: mix(p, values, vs, v_format))

        return rows.fold_blocks(length[b], slots, block, step, softmax_state.unit(q.shape[2:]))

    return rows.per_head(one_head, *q.shape[:2])
