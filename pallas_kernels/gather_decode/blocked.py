"""Attention over selected pages in plain JAX: a head and a few pages at a time are gathered, used and forgotten."""

import jax
import jax.numpy as jnp

from pallas_kernels import rows, softmax_state
from pallas_kernels.formats import Format
from pallas_kernels.gather_decode.pages import Pages, as_pages, page_size
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
    num_pages, num_found = page_length.shape[-1], page_index.shape[-1]
    size = page_size(k, k_format, num_pages)
    at_once = min(max(rows.READ_BLOCK // size, 1), num_found)
    pages = as_pages(k, num_pages), as_pages(v, num_pages)

    def one_head(b: jax.Array, h: jax.Array) -> softmax_state.State:
        queries, found = q[b, h].astype(jnp.float32), page_index[b, h]
        lengths = page_length[b, h if page_length.shape[1] > 1 else 0]

        def step(first: jax.Array, fresh: jax.Array, state: softmax_state.State) -> softmax_state.State:
            index = jax.lax.dynamic_slice(found, (first,), (at_once,))
            exists = fresh[0] & (index >= 0)
            index = jnp.maximum(index, 0)
            keys, values = (
                rows.decoded(jax.tree.map(lambda a: a[b, h, index], x), fmt).reshape(-1, q.shape[-1])
                for x, fmt in zip(pages, (k_format, v_format), strict=True)
            )  # [n * P, D]
            live = jnp.arange(size)[None] < jnp.where(exists, lengths[index], 0)[:, None]
            logits = capped(queries @ keys.T, soft_cap)
            return softmax_state.update(state, logits, live.reshape(1, -1), lambda p: p @ values)

        last = jnp.where(found >= 0, jnp.arange(num_found) + 1, 0).max()
        return rows.fold_blocks(last, num_found, at_once, step, softmax_state.unit(queries.shape))

    return rows.per_head(one_head, *q.shape[:2])
