"""Tokens for which the last queries of the prompt vote."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.policies.base import Prompt, Stat
from kvcomp_jax.policies.prompt_rank import PromptRank
from kvcomp_jax.types import pytree, static


@pytree
class WindowVote(PromptRank):
    """Rank a prompt's tokens by the attention that its last queries pay them, pooled along the text.

    Votes are summed over the queries, pooled for each query head, and averaged over the heads of a group: each KV head
    makes its own choice.

    Attributes:
      num_queries: Voters, the last tokens of the prompt. They get no votes themselves.
      kernel_size: Neighbours pooled over, odd, itself included; 1 = no pooling.
      pooling: "avg", where tokens beyond the ends and the voters count as zeros, or "max".

    Source: SnapKV, Li et al. 2024, arXiv:2404.14469, section 4; the choice a KV head is kvpress'.
    """

    num_queries: int = static(default=32)
    kernel_size: int = static(default=7)
    pooling: Literal["avg", "max"] = static(default="max")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_queries < 1:
            raise ValueError(f"num_queries={self.num_queries} must be at least 1.")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd and positive.")
        if self.pooling not in ("avg", "max"):
            raise ValueError(f"pooling={self.pooling!r} must be 'avg' or 'max'.")

    def num_probes(self, capacity: int) -> int:
        """The voters."""
        return min(self.num_queries, capacity)

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> jax.Array:
        """Count the votes: f32[B, K, S]."""
        del stat
        place = jnp.arange(prompt.k.shape[2], dtype=jnp.int32)[None]
        candidate = (place < (prompt.length - self.num_queries)[:, None])[:, None]
        if self.pooling == "avg":  # sums and means commute, so one pass over all heads does
            return self._pool(jnp.where(candidate, prompt.mass(prompt.kept.at), 0.0))
        return self._pool(jnp.where(candidate[:, None], prompt.mass_by_head(prompt.kept.at), 0.0)).mean(2)

    def _pool(self, votes: jax.Array) -> jax.Array:
        """Pool along the last axis, stride 1, as many as before."""
        ones, half = (1,) * (votes.ndim - 1), self.kernel_size // 2
        shape = (*ones, self.kernel_size)
        padding = ((0, 0),) * (votes.ndim - 1) + ((half, half),)
        if self.pooling == "max":
            return lax.reduce_window(votes, -jnp.inf, lax.max, shape, (*ones, 1), padding)
        return lax.reduce_window(votes, 0.0, lax.add, shape, (*ones, 1), padding) / self.kernel_size
