"""Decode attention over low-rank coefficients on TPUs: each side dense or codes in words."""

import jax

from pallas_kernels import rows, softmax_state, tpu_decode
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.low_rank_decode.block_sizes import tpu_block
from pallas_kernels.quantized_decode.block_sizes import tpu_sizes
from pallas_kernels.quantized_decode.tpu_side import Side
from pallas_kernels.tpu_dense import Dense
from pallas_kernels.tpu_rows import refuse_float16


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
    interpret: bool = False,
) -> softmax_state.State:
    """See `api.low_rank_decode`."""
    num_slots, dims = rows.num_slots(k, k_format), (rows.dim(k), rows.dim(v))
    dense = [x for x in (k, v) if not isinstance(x, Quantized)]
    refuse_float16(*dense)
    sides = (dims[0], k_format), (dims[1], v_format)
    block, tile = tpu_sizes(num_slots, *sides, most=tpu_block(*dense))
    keys, values = (Dense(dim, block, tile) if fmt is None else Side(fmt, dim, block, tile) for dim, fmt in sides)
    return tpu_decode.decode(
        "low_rank_decode", tpu_decode.padded(q), k, v, length, pos, q_pos,
        keys=keys, values=values, num_rows=q.shape[2], num_slots=num_slots,
        dtype=tpu_decode.product_dtype(q, *dense),
        soft_cap=soft_cap, sliding_window=sliding_window, interpret=interpret,
    )  # fmt: skip
