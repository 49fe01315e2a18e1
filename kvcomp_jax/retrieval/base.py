"""The contract of an index: of the tokens that a rung holds, which does a query read?"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs import Codec
from kvcomp_jax.types import pytree

Summary = Any  # what an index remembers of a rung: arrays [B, K, ...]
Heads = str | int  # "query", "kv" or groups


@pytree
class Selection:
    """Pages that are read, the best first; G is 1 where the query heads of a KV head read the same."""

    page: jax.Array  # i32[B, K, G, n], -1 = none
    first: jax.Array | None  # i32[B, K, G, n], slot of the page from which on it is read; None = 0
    end: jax.Array  # i32[B, K, G, n], slot before which it ends


@dataclasses.dataclass(frozen=True)
class Index(abc.ABC):
    """Rank what a rung holds by a query, from a summary that is made when tokens enter the rung.

    Attributes:
      heads: Who ranks together. "query": each query head ranks and reads for itself; "kv": the query heads of a KV head
        by the mean of their scores; an int: that many groups of KV heads, 1 for the whole layer, by the mean.
    """

    heads: Heads = "query"

    def __post_init__(self) -> None:
        if self.heads not in ("query", "kv") and (not isinstance(self.heads, int) or self.heads < 1):
            raise ValueError(f"heads={self.heads!r} must be 'query', 'kv' or a number of groups of KV heads.")

    @property
    @abc.abstractmethod
    def page_size(self) -> int:
        """Tokens that are read together; they start at a multiple of it."""

    @property
    def settles_at_once(self) -> bool:
        """Whether a prompt settles up to the exact window, not only in whole blocks; rungs then need that room."""
        return False

    @property
    def ranks_pages(self) -> bool:
        """Whether what is ranked are the pages themselves."""
        return False

    @abc.abstractmethod
    def paged(self, unit: int) -> "Index":
        """This index with pages of whole units, for codecs that encode so many tokens together."""

    @abc.abstractmethod
    def check(self, k: Codec, v: Codec, block_size: int) -> None:
        """Raise ValueError if codecs or blocks do not suit."""

    @abc.abstractmethod
    def empty(
        self, batch: int, num_kv_heads: int, capacity: int, block_size: int, head_dim: int, dtype: Any
    ) -> Summary:
        """The summary of an empty rung of `capacity` tokens that later grows by `block_size` at a time."""

    @abc.abstractmethod
    def from_prompt(self, summary: Summary, keys: jax.Array, count: jax.Array) -> tuple[Summary, jax.Array | None]:
        """Summarise a prompt's keys [B, K, S, D], count i32[B] of them real, that enter an empty rung.

        Returns:
          The summary, and in which order the tokens shall be stored, i32[B, K, S]; None = as they come.
        """

    @abc.abstractmethod
    def add(
        self, summary: Summary, keys: jax.Array, first: jax.Array, due: jax.Array
    ) -> tuple[Summary, jax.Array | None]:
        """Summarise a block's keys [B, K, P, D] that enter slots first .. first + P (i32[B]), in rows that are due.

        Returns:
          As `from_prompt`.
        """

    @abc.abstractmethod
    def rank(self, q: jax.Array, summary: Summary) -> jax.Array:
        """Score whatever the index ranks by queries q f32[B, K, G, D]: f32[B, K, G, N]; higher is read first."""

    @abc.abstractmethod
    def select(
        self, scores: jax.Array, summary: Summary, filled: jax.Array, limit: jax.Array, num_pages: int
    ) -> Selection:
        """Choose up to `limit` i32[B] tokens, in at most `num_pages` pages, by pooled scores f32[B, K', G, N].

        Args:
          scores: See `pooled`.
          summary: Of the rung.
          filled: i32[B], slots of the rung that hold tokens, from the first on.
          limit: i32[B].
          num_pages: Pages to return.

        Returns:
          A selection with K' in place of K.
        """

    def live_bytes(self, summary: Summary, num_tokens: int) -> int:
        """Bytes of one row's summary that describe `num_tokens` tokens; here all that are allocated."""
        del num_tokens
        return sum(x.size // x.shape[0] * x.dtype.itemsize for x in jax.tree.leaves(summary))

    def num_groups(self, num_kv_heads: int) -> int:
        """Groups of KV heads that read the same.

        Raises:
          ValueError: If `heads` does not divide the KV heads.
        """
        groups = num_kv_heads if isinstance(self.heads, str) else self.heads
        if num_kv_heads % groups:
            raise ValueError(f"heads={self.heads} groups must divide the {num_kv_heads} KV heads of the model.")
        return groups

    def pooled(self, scores: jax.Array) -> jax.Array:
        """Average scores f32[B, K, G, N] over those who rank together: [B, K or groups, G or 1, N]."""
        if self.heads == "query":
            return scores
        batch, heads, _, num = scores.shape
        groups = self.num_groups(heads)
        return scores.reshape(batch, groups, -1, num).mean(2, keepdims=True)


def check_page(page_size: int, k: Codec, v: Codec, block_size: int) -> None:
    """Raise ValueError unless pages are of whole units of codecs, and blocks of whole pages."""
    for codec in (k, v):
        if page_size % codec.unit:
            raise ValueError(
                f"page_size={page_size} must be a multiple of {codec.unit}, the tokens that {codec} encodes together."
            )
    if block_size % page_size:
        raise ValueError(f"block_size={block_size} must be a multiple of page_size={page_size}.")


def by_head(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """Give every KV head what its group has: [B, groups, ...] -> [B, K, ...]."""
    return jnp.repeat(x, num_kv_heads // x.shape[1], 1)


def over_heads(selection: Selection, num_kv_heads: int) -> Selection:
    """Give every KV head the selection of its group."""
    return jax.tree.map(lambda x: by_head(x, num_kv_heads), selection)
