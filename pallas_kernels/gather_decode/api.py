"""Public functions of attention over selected pages: checks, dispatch, and the selection."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch, rows
from pallas_kernels.formats import Format
from pallas_kernels.gather_decode.pages import Pages, as_rows


def gather_decode(
    q: jax.Array,
    k: Pages,
    v: Pages,
    page_index: jax.Array,
    page_length: jax.Array,
    *,
    k_format: Format | None = None,
    v_format: Format | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attend from a few queries to the pages that were selected for their KV head; no other page is read.

    Args:
      q: [B, K, R, D], already multiplied by the softmax scale.
      k, v: [B, K, N, P, D] in f32 or bf16, or the arrays of `quantize_pack` over [B, K, N * P, D], P then a multiple of
        the tokens that share words and, per channel, of `group_size`.
      page_index: i32[B, K, n], distinct pages of each head; -1 = none.
      page_length: i32[B, K or 1, N], live slots at the front of each page.
      k_format, v_format: What quantised arrays mean; None for dense ones.
      soft_cap, implementation, interpret: As in `quantized_decode`.

    Returns:
      The unnormalised state `acc f32[B, K, R, D]`, `max f32[B, K, R]`, `sum f32[B, K, R]`.

    Raises:
      ValueError: If shapes disagree, or a format's words or groups cross pages.
    """
    num_pages = page_length.shape[-1]
    if _check_pages("k", k, k_format, q, num_pages) != _check_pages("v", v, v_format, q, num_pages):
        raise ValueError("k and v must have pages of one size.")
    if page_index.ndim != 3 or page_index.shape[:2] != q.shape[:2]:
        raise ValueError(f"page_index {page_index.shape} must be [B, K, n] for q {q.shape}.")
    if page_length.shape[:2] not in ((q.shape[0], 1), q.shape[:2]):
        raise ValueError(f"page_length {page_length.shape} must be [B, K or 1, N] for q {q.shape}.")
    options = {"k_format": k_format, "v_format": v_format, "soft_cap": soft_cap}
    return dispatch.call(
        "gather_decode", implementation, q, k, v, page_index, page_length, **options, interpret=interpret
    )


def page_top_k(scores: jax.Array, page_length: jax.Array, num_pages: int) -> jax.Array:
    """Select the pages with the highest scores among those that hold something.

    Args:
      scores: f32[B, K, N]; -inf is never selected, +inf always.
      page_length: i32[B, K or 1, N]; pages of length 0 are never selected.
      num_pages: Pages to select, at most N.

    Returns:
      i32[B, K, num_pages], best first, -1 where there are no more.
    """
    if num_pages > scores.shape[-1]:
        raise ValueError(f"num_pages={num_pages} exceeds the {scores.shape[-1]} pages of scores {scores.shape}.")
    best, index = lax.top_k(jnp.where(page_length > 0, scores, -jnp.inf), num_pages)
    return jnp.where(best > -jnp.inf, index, -1)


def _check_pages(name: str, x: Pages, fmt: Format | None, q: jax.Array, num_pages: int) -> int:
    """Slots of a page."""
    slots = rows.check(name, as_rows(x), fmt, q)
    if rows.dim(x) != q.shape[-1] or slots % num_pages or (fmt is None and jax.tree.leaves(x)[0].shape[2] != num_pages):
        raise ValueError(
            f"{name} of {slots} slots and head_dim {rows.dim(x)} does not fit {num_pages} pages, q {q.shape}."
        )
    size = slots // num_pages
    if fmt is not None and size % rows.unit(fmt):
        raise ValueError(f"pages of {size} slots cut the {rows.unit(fmt)} slots that {name} encodes together.")
    return size
