"""The definition of homomorphic decode attention: round q and p to 8 bits, and multiply what all four stand for."""

import jax
import jax.numpy as jnp

from pallas_kernels import softmax_state
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.homomorphic_decode.partitions import rounded
from pallas_kernels.prefill.reference import capped
from pallas_kernels.quantize_pack.reference import dequantize
from pallas_kernels.quantized_decode.reference import live_slots


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
    del k_sums, v_sums  # the expansion needs them, its result does not
    keys, values = dequantize(k, k_format), dequantize(v, v_format)  # [B, K, S, D]
    queries = rounded(q.astype(jnp.float32), k_format.group_size)
    logits = capped(jnp.einsum("bkrd,bksd->bkrs", queries, keys, precision="highest"), soft_cap)
    live = live_slots(length, pos, q_pos, jnp.arange(keys.shape[2]), sliding_window)
    return softmax_state.update(
        softmax_state.unit(q.shape),
        logits,
        live,
        lambda p: jnp.einsum("bkrs,bksd->bkrd", rounded(p, v_format.group_size), values, precision="highest"),
    )
