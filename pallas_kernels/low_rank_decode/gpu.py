"""Decode attention over low-rank coefficients in Triton, Ampere and newer: rows like any other, of two widths."""

import jax

from pallas_kernels import rows, triton_attention
from pallas_kernels.formats import Format
from pallas_kernels.softmax_state import State


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
) -> State:
    """See `api.low_rank_decode`."""
    return triton_attention.attend(
        q, k, v, length[:, None], pos, q_pos, k_format=k_format, v_format=v_format, soft_cap=soft_cap,
        sliding_window=sliding_window, interpret=interpret,
    )  # fmt: skip
