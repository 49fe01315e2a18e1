"""The definition of decode attention over codes of non-uniform levels: decode all, then attend."""

import jax
import jax.numpy as jnp

from pallas_kernels.codebook_decode.rows import CodebookRows, decoded
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
    keys, values = decoded(k, q.shape[1], pos), decoded(v, q.shape[1], None)  # [B, K, S, D]
    logits = jnp.einsum("bkrd,bksd->bkrs", q.astype(jnp.float32), keys, precision="highest")
    live = live_slots(length, pos, q_pos, jnp.arange(keys.shape[2]), sliding_window)

    def mix(p: jax.Array) -> jax.Array:
        return jnp.einsum("bkrs,bksd->bkrd", p, values, precision="highest")

    return update(unit(q.shape), capped(logits, soft_cap), live, mix)
