"""The definition of decode attention over entropy-coded rows: decode all, then attend."""

import jax
import jax.numpy as jnp

from pallas_kernels.entropy_decode.rows import RowFormat, Rows, decoded
from pallas_kernels.prefill.reference import MASK_VALUE, capped
from pallas_kernels.quantized_decode.reference import live_slots


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.entropy_decode`."""
    keys, values = decoded(k, k_lengths, k_format), decoded(v, v_lengths, v_format)  # [B, K, S, D]
    logits = jnp.einsum("bkrd,bksd->bkrs", q.astype(jnp.float32), keys, precision="highest")
    live = live_slots(length, pos, q_pos, jnp.arange(keys.shape[2]), sliding_window)
    logits = jnp.where(live, capped(logits, soft_cap), MASK_VALUE)
    top = logits.max(-1)
    p = jnp.where(live, jnp.exp(logits - top[..., None]), 0.0)
    return jnp.einsum("bkrs,bksd->bkrd", p, values, precision="highest"), top, p.sum(-1)
