"""Clusters of alike keys by their means."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.codecs import Codec
from kvcomp_jax.retrieval.base import Index, Selection, check_page
from kvcomp_jax.retrieval.kmeans import kmeans
from kvcomp_jax.types import pytree


@pytree
class Clusters:
    """Clusters in the order in which their tokens are stored: each occupies consecutive slots of the rung.

    The prompt's clusters come first, then those of each block that entered later. Clusters of size 0 are none.
    """

    centroid: jax.Array  # [B, K, C, D], dtype of the keys
    size: jax.Array  # i32[B, K, C]
    blocks: jax.Array  # i32[B], blocks that entered after the prompt


@dataclasses.dataclass(frozen=True)
class Centroids(Index):
    """K-means clusters of keys by cosine, ranked by the product of query and centroid; read whole, the last in part.

    A prompt's tokens are clustered together and stored cluster after cluster, in each by position; a block that enters
    later is clustered by itself. Where codecs store `page` tokens together, the pages that a cluster touches are
    gathered and counted, and its own tokens in them attended to. Initial centroids are keys drawn with replacement, the
    same places for all heads. Source: ClusterKV, Liu et al. 2024, arXiv:2412.03213.

    Attributes:
      clusters: Of a prompt, at most.
      tokens_per_cluster: A prompt of T tokens has T // tokens_per_cluster clusters, if that is fewer; None: `clusters`.
      block_clusters: Of each later block.
      iterations: Rounds of k-means.
      page: Tokens read together.
      seed: Of the draws.
    """

    clusters: int = 400
    tokens_per_cluster: int | None = None
    block_clusters: int = 8
    iterations: int = 20
    page: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clusters", "block_clusters", "page"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.iterations < 0 or (self.tokens_per_cluster is not None and self.tokens_per_cluster < 1):
            raise ValueError(
                f"iterations={self.iterations} must be >= 0 and tokens_per_cluster={self.tokens_per_cluster} >= 1."
            )
        if self.heads not in ("query", "kv"):
            raise ValueError(f"heads={self.heads!r} must be 'query' or 'kv': each KV head has clusters of its own.")

    @property
    def page_size(self) -> int:
        """`page`."""
        return self.page

    @property
    def settles_at_once(self) -> bool:
        """True: all of a prompt is clustered."""
        return True

    def paged(self, unit: int) -> "Centroids":
        """Pages rounded up to whole units."""
        return dataclasses.replace(self, page=-(-self.page // unit) * unit)

    def check(self, k: Codec, v: Codec, block_size: int) -> None:
        """See `check_page`; positions are lost with the order."""
        check_page(self.page, k, v, block_size)
        for codec in (k, v):
            if codec.uses_pos:
                raise ValueError(f"clusters reorder tokens, and {codec.name} must know where each stands.")

    def empty(
        self, batch: int, num_kv_heads: int, capacity: int, block_size: int, head_dim: int, dtype: Any
    ) -> Clusters:
        """No clusters, with room for those of a prompt and of blocks that fill the rung."""
        slots = (batch, num_kv_heads, self.clusters + -(-capacity // block_size) * self.block_clusters)
        return Clusters(
            centroid=jnp.zeros((*slots, head_dim), dtype),
            size=jnp.zeros(slots, jnp.int32),
            blocks=jnp.zeros(batch, jnp.int32),
        )

    def from_prompt(self, summary: Clusters, keys: jax.Array, count: jax.Array) -> tuple[Clusters, jax.Array]:
        """Cluster a whole prompt."""
        wanted = jnp.full_like(count, self.clusters)
        if self.tokens_per_cluster is not None:
            wanted = jnp.clip(count // self.tokens_per_cluster, 1, self.clusters)
        centroid, label, size = self._cluster(keys, count, self.clusters, wanted)
        here = (slice(None), slice(None), slice(self.clusters))
        summary = dataclasses.replace(
            summary,
            centroid=summary.centroid.at[here].set(centroid.astype(summary.centroid.dtype)),
            size=summary.size.at[here].set(size),
        )
        return summary, jnp.argsort(label, -1, stable=True).astype(jnp.int32)

    def add(self, summary: Clusters, keys: jax.Array, first: jax.Array, due: jax.Array) -> tuple[Clusters, jax.Array]:
        """Cluster a block and append its clusters; nothing else changes."""
        del first
        num = self.block_clusters
        whole = jnp.full(keys.shape[0], keys.shape[2], jnp.int32)
        centroid, label, size = self._cluster(keys, whole, num, jnp.full_like(whole, num))
        at = self.clusters + (summary.blocks * num)[:, None] + jnp.arange(num)[None]
        at = jnp.where(due[:, None], at, summary.size.shape[2])[:, None]
        b, h = jnp.arange(keys.shape[0])[:, None, None], jnp.arange(keys.shape[1])[None, :, None]
        summary = Clusters(
            centroid=summary.centroid.at[b, h, at].set(centroid.astype(summary.centroid.dtype), mode="drop"),
            size=summary.size.at[b, h, at].set(size, mode="drop"),
            blocks=summary.blocks + due,
        )
        return summary, jnp.argsort(label, -1, stable=True).astype(jnp.int32)

    def _cluster(
        self, keys: jax.Array, count: jax.Array, num: int, wanted: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `kmeans`, of the first `count` i32[B] keys into `wanted` i32[B] of `num` clusters."""
        draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(jax.random.key(self.seed), i)))
        place = (draws(jnp.arange(num))[None] * count[:, None]).astype(jnp.int32)  # [B, C]
        start = jnp.take_along_axis(keys, place[:, None, :, None], 2, mode="clip")
        live = jnp.arange(keys.shape[2])[None] < count[:, None]
        return kmeans(keys, live, start, jnp.arange(num)[None] < wanted[:, None], self.iterations)

    def rank(self, q: jax.Array, summary: Clusters) -> jax.Array:
        """Products of query and centroid, neither normalised; -inf where there is no cluster."""
        scores = jnp.einsum("bkgd,bkcd->bkgc", q, summary.centroid, preferred_element_type=jnp.float32)
        return jnp.where(summary.size[:, :, None] > 0, scores, -jnp.inf)

    def select(
        self, scores: jax.Array, summary: Clusters, filled: jax.Array, limit: jax.Array, num_pages: int
    ) -> Selection:
        """Whole clusters, the best first, until the limit cuts the last one.

        What enters a full rung overwrites its oldest and is read as those were: its own clusters lie beyond the end.
        """
        # One more than are asked for: all of them, XLA would sort, which on CPU takes five times as long.
        more = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)
        order = lax.top_k(more, scores.shape[-1])[1]  # [B, K, G, C]
        first = jnp.cumsum(summary.size, -1) - summary.size
        size, first = (jnp.take_along_axis(x[:, :, None], order, -1) for x in (summary.size, first))
        begin = first // self.page
        touched = jnp.where(size > 0, (first + size - 1) // self.page - begin + 1, 0)
        until = jnp.cumsum(touched, -1)
        place = jnp.arange(num_pages, dtype=jnp.int32)
        rank = _num_until(until, num_pages)  # [B, K, G, n], of the cluster that each page is read for

        def of(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, rank, -1, mode="clip")

        page = of(begin - until + touched) + place[None, None, None]
        live = (rank < until.shape[-1]) & (place[None] < (limit // self.page)[:, None])[:, None, None]
        page = jnp.where(live & (page * self.page < filled[:, None, None, None]), page, -1)
        if self.page == 1:  # no token is of two clusters
            return Selection(page=page, first=jnp.zeros_like(page), end=jnp.ones_like(page))
        return Selection(
            page=page,
            first=jnp.maximum(of(first) - page * self.page, 0),
            end=jnp.minimum(of(first + size) - page * self.page, self.page),
        )


def _num_until(ends: jax.Array, num: int) -> jax.Array:
    """How many of the ends i32[..., C], none negative, are at or before each of the places 0 .. num: i32[..., num]."""
    flat = jnp.minimum(ends, num).reshape(-1, ends.shape[-1])
    line = jnp.arange(flat.shape[0])[:, None]
    counts = jnp.zeros((flat.shape[0], num + 1), jnp.int32).at[line, flat].add(1)
    return jnp.cumsum(counts, -1)[:, :num].reshape(*ends.shape[:-1], num)
