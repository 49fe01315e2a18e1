"""Attention over selected pages in Triton, Ampere and newer: units of slots are looked up in the page index."""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_attention
from pallas_kernels.formats import Format
from pallas_kernels.gather_decode.pages import Pages, as_rows, page_size
from pallas_kernels.softmax_state import State


def gather_decode(
    q: jax.Array,
    k: Pages,
    v: Pages,
    page_index: jax.Array,
    page_length: jax.Array,
    *,
    k_format: Format | None,
    v_format: Format | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> State:
    """See `api.gather_decode`."""
    last = jnp.where(page_index >= 0, jnp.arange(1, page_index.shape[-1] + 1), 0).max(-1)  # [B, K]
    reach = last * page_size(k, k_format, page_length.shape[-1])
    return triton_attention.attend(
        q, as_rows(k), as_rows(v), reach, page_index=page_index, page_length=page_length,
        k_format=k_format, v_format=v_format, soft_cap=soft_cap, interpret=interpret,
    )  # fmt: skip
