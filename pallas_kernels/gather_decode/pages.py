"""Views of pages as rows and of rows as pages; both are free."""

import jax

from pallas_kernels import rows
from pallas_kernels.formats import Format, Quantized

Pages = jax.Array | Quantized  # [B, K, N, P, D], or a `Quantized` over [B, K, N * P, D]


def as_rows(x: Pages) -> rows.Rows:
    """[B, K, N, P, D] -> [B, K, N * P, D]."""
    return x if isinstance(x, Quantized) else x.reshape(*x.shape[:2], -1, x.shape[-1])


def as_pages(x: Pages, num_pages: int) -> Pages:
    """Every array [B, K, N * rows, ...] -> [B, K, N, rows, ...]."""
    return jax.tree.map(lambda a: a.reshape(*a.shape[:2], num_pages, -1, a.shape[-1]), x)


def page_size(x: Pages, fmt: Format | None, num_pages: int) -> int:
    """P."""
    return rows.num_slots(as_rows(x), fmt) // num_pages
