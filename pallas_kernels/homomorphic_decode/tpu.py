"""Homomorphic decode attention on TPUs: int8 products on the matrix unit, corrected in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels import rows, softmax_state, tpu_decode
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.homomorphic_decode.tpu_side import Keys, Summed, Values, queries
from pallas_kernels.quantized_decode.block_sizes import tpu_sizes
from pallas_kernels.tpu_rows import LANES


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
    interpret: bool = False,
) -> softmax_state.State:
    """See `api.homomorphic_decode`."""
    if LANES % v_format.group_size:
        raise Unsupported(f"a group of {v_format.group_size} values is no even part of {LANES} lanes.")
    num_slots, dim = rows.num_slots(k, k_format), q.shape[-1]
    block, tile = tpu_sizes(num_slots, (dim, k_format), (dim, v_format))
    return tpu_decode.decode(
        "homomorphic_decode",
        queries(tpu_decode.padded(q), k_format.group_size),
        Summed(k, k_sums), Summed(v, v_sums), length, pos, q_pos,
        keys=Keys(k_format, dim, block, tile), values=Values(v_format, dim, block, tile),
        num_rows=q.shape[2], num_slots=num_slots, dtype=jnp.int8,
        soft_cap=soft_cap, sliding_window=sliding_window, interpret=interpret,
    )  # fmt: skip
