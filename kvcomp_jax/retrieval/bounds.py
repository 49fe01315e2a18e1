"""Pages by a box around their keys."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs import Codec
from kvcomp_jax.retrieval.base import Index, Selection, Summary, check_page
from kvcomp_jax.types import pytree
from pallas_kernels.gather_decode import page_top_k


@pytree
class Boxes:
    """An axis-aligned box a page."""

    upper: jax.Array  # [B, K, N, D], dtype of the keys
    lower: jax.Array  # [B, K, N, D]


@dataclasses.dataclass(frozen=True)
class Bounds(Index):
    """Pages of consecutive tokens, each summarised by a box around its keys and ranked by the box's best product.

    The box stands around the middle c of minimum and maximum of each channel. Its half widths are the largest distance
    of a key from c ("max": no key of the page exceeds the score), the mean distance ("mean": no bound, but a better
    estimate), or the middle of smallest and largest distance ("center").
    score = sum_i max(q_i upper_i, q_i lower_i), computed as relu(q) . upper - relu(-q) . lower.
    Sources: Quest, Tang et al. 2024, arXiv:2406.10774 ("max"); ArkVale, Chen et al. 2024, NeurIPS (all three).
    """

    page: int = 16
    radius: str = "max"  # or "mean" or "center"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise ValueError(f"page_size={self.page} must be at least 1 token.")
        if self.radius not in ("max", "mean", "center"):
            raise ValueError(f"radius={self.radius!r} must be 'max', 'mean' or 'center'.")

    @property
    def page_size(self) -> int:
        """`page`."""
        return self.page

    @property
    def ranks_pages(self) -> bool:
        """True."""
        return True

    def paged(self, unit: int) -> "Bounds":
        """Pages rounded up to whole units."""
        return dataclasses.replace(self, page=-(-self.page // unit) * unit)

    def check(self, k: Codec, v: Codec, block_size: int) -> None:
        """See `check_page`."""
        check_page(self.page, k, v, block_size)

    def empty(self, batch: int, num_kv_heads: int, capacity: int, block_size: int, head_dim: int, dtype: Any) -> Boxes:
        """A box of zeros for every page."""
        del block_size
        shape = (batch, num_kv_heads, capacity // self.page, head_dim)
        return Boxes(upper=jnp.zeros(shape, dtype), lower=jnp.zeros(shape, dtype))

    def summarise(self, keys: jax.Array) -> Boxes:
        """Boxes of keys [B, K, S, D], one every `page` tokens."""
        rows = keys.reshape(*keys.shape[:2], -1, self.page, keys.shape[-1])
        low, high = rows.min(3), rows.max(3)
        if self.radius != "max":
            low, high = low.astype(jnp.float32), high.astype(jnp.float32)
            center = (low + high) / 2
            apart = jnp.abs(center[:, :, :, None] - rows.astype(jnp.float32))
            radius = apart.mean(3) if self.radius == "mean" else (apart.min(3) + apart.max(3)) / 2
            low, high = center - radius, center + radius
        return Boxes(upper=high.astype(keys.dtype), lower=low.astype(keys.dtype))

    def from_prompt(self, summary: Boxes, keys: jax.Array, count: jax.Array) -> tuple[Boxes, None]:
        """Boxes of all pages; those beyond `count` are never looked at."""
        del count
        return jax.tree.map(lambda x, new: new.astype(x.dtype), summary, self.summarise(keys)), None

    def add(self, summary: Boxes, keys: jax.Array, first: jax.Array, due: jax.Array) -> tuple[Boxes, None]:
        """Write the boxes of a block's pages."""
        new = self.summarise(keys)
        b, h = jnp.arange(keys.shape[0])[:, None, None], jnp.arange(keys.shape[1])[None, :, None]
        page = (first // self.page)[:, None] + jnp.arange(new.upper.shape[2])[None]
        page = jnp.where(due[:, None], page, summary.upper.shape[2])[:, None]

        def write(x: jax.Array, y: jax.Array) -> jax.Array:
            return x.at[b, h, page].set(y.astype(x.dtype), mode="drop")

        return jax.tree.map(write, summary, new), None

    def rank(self, q: jax.Array, summary: Boxes) -> jax.Array:
        """The largest product of a query with a point of the box."""
        positive, negative = jax.nn.relu(q), jax.nn.relu(-q)
        best = jnp.einsum("bkgd,bknd->bkgn", positive, summary.upper, preferred_element_type=jnp.float32)
        return best - jnp.einsum("bkgd,bknd->bkgn", negative, summary.lower, preferred_element_type=jnp.float32)

    def select(
        self, scores: jax.Array, summary: Summary, filled: jax.Array, limit: jax.Array, num_pages: int
    ) -> Selection:
        """The pages of the highest scores."""
        del summary
        batch, heads, groups, num = scores.shape
        length = jnp.clip(filled[:, None] - jnp.arange(num)[None] * self.page, 0, self.page)[:, None]
        flat = scores.reshape(batch, heads * groups, num)
        page = page_top_k(flat, length, min(num_pages, num)).reshape(batch, heads, groups, -1)
        rank = jnp.arange(page.shape[-1])[None]
        page = jnp.where((rank < (limit // self.page)[:, None])[:, None, None], page, -1)
        return Selection(page=page, first=None, end=jnp.full_like(page, self.page))

    def live_bytes(self, summary: Boxes, num_tokens: int) -> int:
        """Those of the pages that hold something."""
        pages = -(-num_tokens // self.page)
        return sum(pages * x.shape[1] * x.shape[3] * x.dtype.itemsize for x in jax.tree.leaves(summary))
