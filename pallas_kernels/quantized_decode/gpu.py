"""Decode attention over packed rows in Triton, Ampere and newer."""

import jax

from pallas_kernels import triton_attention
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.softmax_state import State


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
) -> State:
    """See `api.quantized_decode`."""
    return triton_attention.attend(
        q, k, v, length[:, None], pos, q_pos, k_format=k_format, v_format=v_format, soft_cap=soft_cap,
        sliding_window=sliding_window, interpret=interpret,
    )  # fmt: skip
