"""The definition of decode attention over packed rows: decode all, then attend."""

import jax
import jax.numpy as jnp

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.prefill.reference import MASK_VALUE, capped
from pallas_kernels.quantize_pack.reference import dequantize


def quantized_decode(
    q: jax.Array,
    k: Quantized,
    v: Quantized,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    k_format: Format,
    v_format: Format,
    soft_cap: float | None,
    sliding_window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.quantized_decode`."""
    keys, values = dequantize(k, k_format), dequantize(v, v_format)  # [B, K, S, D]
    logits = jnp.einsum("bkrd,bksd->bkrs", q.astype(jnp.float32), keys, precision="highest")
    logits = capped(logits, soft_cap)
    live = live_slots(length, pos, q_pos, jnp.arange(keys.shape[2]), sliding_window)
    logits = jnp.where(live, logits, MASK_VALUE)
    top = logits.max(-1)
    p = jnp.where(live, jnp.exp(logits - top[..., None]), 0.0)
    return jnp.einsum("bkrs,bksd->bkrd", p, values, precision="highest"), top, p.sum(-1)


def live_slots(
    length: jax.Array, pos: jax.Array | None, q_pos: jax.Array | None, slots: jax.Array, sliding_window: int | None
) -> jax.Array:
    """Which of some slots [S], at positions `pos` [B, K or 1, S], each query sees: bool[B, 1 or K, 1 or R, S]."""
    live = (slots[None] < length[:, None])[:, None, None]  # [B, 1, 1, S]
    if pos is None or q_pos is None:
        return live
    here, at = pos[:, :, None, :], q_pos[:, None, :, None]
    live = live & (here >= 0) & (here <= at)
    return live if sliding_window is None else live & (here > at - sliding_window)
