"""The cases that every backend is checked with: interpreted, compiled ahead of time and on hardware."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case_data import draw_rows, encoded, rows_shape
from pallas_kernels.formats import Format
from pallas_kernels.gather_decode.pages import Pages, as_rows
from pallas_kernels.quantized_decode.cases import HEAD_DIMS, channel, token


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `arguments` draws it, `shapes` describes it without arrays."""

    k_format: Format | None = None  # None: dense
    v_format: Format | None = None
    head_dim: int = 64
    num_kv_heads: int = 3
    rows: int = 3
    num_pages: int = 16
    page_size: int = 32
    selected: int = 5
    filled: tuple[int, ...] = (512, 300)  # slots of each row that hold something, page after page
    lengths_per_head: bool = False  # pages filled at random instead, each head its own
    missing: float = 0.2  # share of the selection that is -1
    soft_cap: float | None = None
    values: str = "normal"  # as in `case_data.draw_rows`
    dtype: str = "float32"  # of q and of dense pages

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        """Positional and keyword arguments of `gather_decode`."""
        rng = np.random.default_rng(seed)
        heads, pages = (len(self.filled), self.num_kv_heads), (self.num_pages, self.page_size)
        q = jnp.asarray(rng.standard_normal((*heads, self.rows, self.head_dim)) * self.head_dim**-0.5, self.dtype)
        k, v = (
            self._pages(draw_rows(rng, (*heads, *pages, self.head_dim), self.values), fmt)
            for fmt in (self.k_format, self.v_format)
        )
        index = rng.permuted(np.broadcast_to(np.arange(self.num_pages), (*heads, self.num_pages)), axis=-1)
        index = np.where(rng.random(index.shape) < self.missing, -1, index)[..., : self.selected]
        filled = np.asarray(self.filled)[:, None, None] - np.arange(self.num_pages) * self.page_size
        if self.lengths_per_head:
            filled = rng.integers(0, self.page_size + 1, (*heads, self.num_pages))
        length = jnp.asarray(np.clip(filled, 0, self.page_size), jnp.int32)
        return (q, k, v, jnp.asarray(index, jnp.int32), length), self.options

    @property
    def options(self) -> dict:
        """Keyword arguments of `gather_decode`."""
        return {name: getattr(self, name) for name in ("k_format", "v_format", "soft_cap")}

    def shapes(self) -> tuple:
        """The positional arguments as ShapeDtypeStructs; draws nothing, as serving shapes take gigabytes."""
        heads, dtype = (len(self.filled), self.num_kv_heads), jnp.dtype(self.dtype)
        pages = (*heads, self.num_pages, self.page_size, self.head_dim)
        flat = (*heads, self.num_pages * self.page_size, self.head_dim)
        k, v = (rows_shape(flat if fmt else pages, dtype, fmt) for fmt in (self.k_format, self.v_format))
        lengths = (*heads, self.num_pages) if self.lengths_per_head else (heads[0], 1, self.num_pages)
        return (
            jax.ShapeDtypeStruct((*heads, self.rows, self.head_dim), dtype),
            k,
            v,
            jax.ShapeDtypeStruct((*heads, self.selected), jnp.int32),
            jax.ShapeDtypeStruct(lengths, jnp.int32),
        )

    def _pages(self, x: np.ndarray, fmt: Format | None) -> Pages:
        if fmt is None:
            return jnp.asarray(x, self.dtype)
        return encoded(as_rows(jnp.asarray(x)), fmt)


CASES = {
    **{f"head_dim-{d}": Case(head_dim=d) for d in HEAD_DIMS},
    **{f"quantized-{b}": Case(channel(b), token(b)) for b in (2, 3, 4, 8)},
    "by-token": Case(token(4), channel(4)),
    "dense-keys": Case(None, token(4)),
    "bfloat16": Case(dtype="bfloat16"),
    "bfloat16-quantized": Case(channel(4), token(4), head_dim=128, dtype="bfloat16"),
    "none-missing": Case(missing=0.0),
    "all-missing": Case(missing=1.0),
    "empty-rows": Case(filled=(0, 1, 31, 33)),
    "lengths-per-head": Case(lengths_per_head=True),
    **{f"page-{p}": Case(page_size=p, filled=(16 * p, 10 * p + 3)) for p in (8, 16, 64, 128)},
    "one-page": Case(selected=1, missing=0.0),
    "many-pages": Case(num_pages=90, selected=47, filled=(90 * 32, 1000)),
    "all-pages": Case(selected=16),
    "soft-cap": Case(soft_cap=20.0),
    "constant": Case(channel(2), token(2), values="constant"),
    "outliers": Case(channel(4), token(4), values="outliers"),
    **{f"rows-{r}-heads-{h}": Case(rows=r, num_kv_heads=h) for r, h in ((1, 1), (4, 8), (16, 2))},
}

# What the ahead-of-time compilation and the benchmarks measure: 2,048 of 32,768 tokens.
SERVING = {
    f"{'bits-4' if quantized else 'bfloat16'}-head_dim-{d}": Case(
        channel(4) if quantized else None,
        token(4) if quantized else None,
        head_dim=d,
        num_kv_heads=8 if d == 128 else 3,
        rows=4 if d == 128 else 3,
        num_pages=1024,
        selected=64,
        filled=(32768,) * 8,
        missing=0.0,
        dtype="bfloat16",
    )
    for d in (64, 128)
    for quantized in (False, True)
}
