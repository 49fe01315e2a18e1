"""The definition of decode attention over low-rank coefficients: decode all, then attend."""

import jax
import jax.numpy as jnp

from pallas_kernels import rows, softmax_state
from pallas_kernels.formats import Format
from pallas_kernels.prefill.reference import capped
from pallas_kernels.quantized_decode.reference import live_slots


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
    keys, values = rows.decoded(k, k_format), rows.decoded(v, v_format)  # [B, K, S, r], [B, K, S, r']
    logits = capped(jnp.einsum("bkrd,bksd->bkrs", q.astype(jnp.float32), keys, precision="highest"), soft_cap)
    live = live_slots(length, pos, q_pos, jnp.arange(keys.shape[2]), sliding_window)
    unit = softmax_state.unit((*q.shape[:3], values.shape[-1]))
    return softmax_state.update(
        unit, logits, live, lambda p: jnp.einsum("bkrs,bksd->bkrd", p, values, precision="highest")
    )
