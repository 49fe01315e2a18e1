"""Pages by a box or a ball around their keys."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs import Codec
from kvcomp_jax.retrieval.base import Index, Selection, Summary, check_page
from kvcomp_jax.retrieval.volumes import RADII, VOLUMES, Balls, Boxes
from pallas_kernels.gather_decode import page_top_k


@dataclasses.dataclass(frozen=True)
class Bounds(Index):
    """Pages of consecutive tokens, each summarised by a volume around its keys and ranked by the volume's best product.

    A volume stands around the middle c of minimum and maximum of each channel. Its radius is the largest distance of a
    key from c ("max": no key of the page exceeds the score), the mean distance ("mean": no bound, but a better
    estimate), or the middle of smallest and largest distance ("center"); of a "box" one in each channel, of a "ball"
    one, in L2.
    Box: score = sum_i max(q_i upper_i, q_i lower_i), computed as relu(q) . upper - relu(-q) . lower.
    Ball: score = q . c + radius |q|, in about half the bytes. Where fewer bits than float32's are kept, c is rounded
    before distances are taken, and radii are rounded up.
    Sources: Quest, Tang et al. 2024, arXiv:2406.10774 (box, "max"); ArkVale, Chen et al. 2024, NeurIPS (both volumes,
    all three radii; its code has boxes alone).
    """

    page: int = 16
    radius: str = "max"  # or "mean" or "center"
    volume: str = "box"  # or "ball"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise ValueError(f"page_size={self.page} must be at least 1 token.")
        if self.radius not in RADII:
            raise ValueError(f"radius={self.radius!r} must be 'max', 'mean' or 'center'.")
        if self.volume not in VOLUMES:
            raise ValueError(f"volume={self.volume!r} must be 'box' or 'ball'.")

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

    def empty(
        self, batch: int, num_kv_heads: int, capacity: int, block_size: int, head_dim: int, dtype: Any
    ) -> Boxes | Balls:
        """A volume of zeros for every page."""
        del block_size
        keys = jax.ShapeDtypeStruct((batch, num_kv_heads, capacity, head_dim), dtype)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(self.summarise, keys))

    def summarise(self, keys: jax.Array) -> Boxes | Balls:
        """Volumes of keys [B, K, S, D], one every `page` tokens, in the keys' dtype."""
        rows = keys.reshape(*keys.shape[:2], -1, self.page, keys.shape[-1])
        return VOLUMES[self.volume].around(rows, self.radius)

    def from_prompt(self, summary: Boxes | Balls, keys: jax.Array, count: jax.Array) -> tuple[Boxes | Balls, None]:
        """Volumes of all pages; those beyond `count` are never looked at."""
        del count
        return self.summarise(keys.astype(_dtype(summary))), None

    def add(
        self, summary: Boxes | Balls, keys: jax.Array, first: jax.Array, due: jax.Array
    ) -> tuple[Boxes | Balls, None]:
        """Write the volumes of a block's pages."""
        new = self.summarise(keys.astype(_dtype(summary)))
        b, h = jnp.arange(keys.shape[0])[:, None, None], jnp.arange(keys.shape[1])[None, :, None]
        page = (first // self.page)[:, None] + jnp.arange(keys.shape[2] // self.page)[None]

        def write(x: jax.Array, y: jax.Array) -> jax.Array:
            at = jnp.where(due[:, None], page, x.shape[2])[:, None]
            return x.at[b, h, at].set(y, mode="drop")

        return jax.tree.map(write, summary, new), None

    def rank(self, q: jax.Array, summary: Boxes | Balls) -> jax.Array:
        """The largest product of a query with a point of the volume."""
        return summary.best(q)

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

    def live_bytes(self, summary: Boxes | Balls, num_tokens: int) -> int:
        """Those of the pages that hold something."""
        pages = -(-num_tokens // self.page)
        return sum(pages * x.shape[1] * math.prod(x.shape[3:]) * x.dtype.itemsize for x in jax.tree.leaves(summary))


def _dtype(summary: Boxes | Balls) -> Any:
    return jax.tree.leaves(summary)[0].dtype
