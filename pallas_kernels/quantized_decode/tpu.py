"""Decode attention over packed rows on TPUs: both sides are codes in words."""

import jax

from pallas_kernels import rows, tpu_decode
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.quantized_decode.block_sizes import tpu_sizes
from pallas_kernels.quantized_decode.tpu_side import Side


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.quantized_decode`."""
    num_slots, dims = rows.num_slots(k, k_format), (q.shape[-1], rows.dim(v))
    block, tile = tpu_sizes(num_slots, (dims[0], k_format), (dims[1], v_format))
    return tpu_decode.decode(
        "quantized_decode", tpu_decode.padded(q), k, v, length, pos, q_pos,
        keys=Side(k_format, dims[0], block, tile), values=Side(v_format, dims[1], block, tile),
        num_rows=q.shape[2], num_slots=num_slots, dtype=tpu_decode.product_dtype(q),
        soft_cap=soft_cap, sliding_window=sliding_window, interpret=interpret,
    )  # fmt: skip
