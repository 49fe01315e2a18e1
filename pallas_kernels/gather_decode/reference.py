"""The definition of attention over selected pages: decode all, gather, attend."""

import jax
import jax.numpy as jnp

from pallas_kernels import rows, softmax_state
from pallas_kernels.formats import Format
from pallas_kernels.gather_decode.pages import Pages, as_pages, as_rows
from pallas_kernels.prefill.reference import capped


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
) -> softmax_state.State:
    """See `api.gather_decode`."""
    num_pages = page_length.shape[-1]
    found = jnp.maximum(page_index, 0)  # [B, K, n]

    def selected(x: Pages, fmt: Format | None) -> jax.Array:  # [B, K, n, P, D]
        pages = as_pages(rows.decoded(as_rows(x), fmt), num_pages)
        return jnp.take_along_axis(pages, found[..., None, None], 2)

    keys, values = selected(k, k_format), selected(v, v_format)
    lengths = jnp.take_along_axis(jnp.broadcast_to(page_length, (*q.shape[:2], num_pages)), found, 2)
    slot = jnp.arange(keys.shape[3])[None, None, None]
    live = slot < jnp.where(page_index >= 0, lengths, 0)[..., None]  # [B, K, n, P]
    logits = jnp.einsum("bkrd,bknpd->bkrnp", q.astype(jnp.float32), keys, precision="highest")
    flat = (*q.shape[:3], -1)
    values = values.reshape(*q.shape[:2], -1, q.shape[-1])
    return softmax_state.update(
        softmax_state.unit(q.shape),
        capped(logits, soft_cap).reshape(flat),
        live.reshape(*q.shape[:2], 1, -1),
        lambda p: jnp.einsum("bkrs,bksd->bkrd", p, values, precision="highest"),
    )
