"""Tokens whose values weigh, too: another policy's choice first, then by attention times the value's norm."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.policies.base import Probes, Prompt, Stat, Watched
from kvcomp_jax.policies.prompt_rank import PromptRank
from kvcomp_jax.types import pytree, static


@pytree
class ValueWeighted(PromptRank):
    """Rank the best tokens of another policy first, and the others by its score times the norm of what they add.

    What evicting a token does to the output is bounded by its attention times the L1 norm of its projected value; in
    each head the first tokens are taken by attention alone.

    Attributes:
      inner: Scores a prompt.
      first: Share of each head's tokens that its score alone chooses.
      budget: Tokens that a head keeps; a float is a share of the prompt.
      beside: How many of them are not ranked.
      epsilon: Added to scores, so that values count where there is no attention.
      projected: Whether the norm is that of projected values, which the model tells (`outputs.output_norm`); if not,
        that of values as cached.

    Source: CriticalKV, Feng et al. 2025, arXiv:2502.03805, algorithm 1.
    """

    inner: PromptRank = static(default=PromptRank())
    first: float = static(default=0.5)
    budget: int | float = static(default=0.5)
    beside: int = static(default=0)
    epsilon: float = static(default=1e-4)
    projected: bool = static(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner.num_sinks != self.num_sinks:
            raise ValueError(f"num_sinks={self.num_sinks} and {self.inner.num_sinks} of the inner policy must agree.")
        if not 0 <= self.first <= 1 or self.epsilon < 0:
            raise ValueError(f"first={self.first} must be in [0, 1] and epsilon={self.epsilon} not negative.")

    @property
    def watches(self) -> bool:
        """As the inner policy."""
        return self.inner.watches

    @property
    def weighs_outputs(self) -> bool:
        """As `projected` says."""
        return self.projected

    def new_watched(self, rows: tuple[int, int, int], head_dim: int, capacity: int) -> Watched:
        """The inner policy's."""
        return self.inner.new_watched(rows, head_dim, capacity)

    def watch(self, watched: Watched, chunk: Probes, capacity: int) -> Watched:
        """As the inner policy."""
        return self.inner.watch(watched, chunk, capacity)

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> jax.Array:
        """The scores, f32[B, K, S]."""
        place = jnp.arange(prompt.k.shape[2])[None]
        candidate = ((place >= self.num_sinks) & (place < prompt.length[:, None]))[:, None]
        score = jnp.where(candidate, self.inner.from_prompt(stat, prompt), -jnp.inf)
        tokens = jnp.full_like(prompt.length, self.budget)
        if isinstance(self.budget, float):
            tokens = jnp.floor(prompt.length * self.budget).astype(jnp.int32)
        first = jnp.floor(self.first * (tokens - self.beside)).astype(jnp.int32)
        norm = prompt.projected if self.projected else jnp.abs(prompt.v.astype(jnp.float32)).sum(-1)
        return jnp.where(self._best(score, first), jnp.inf, (score + self.epsilon) * norm)

    def _best(self, score: jax.Array, count: jax.Array) -> jax.Array:
        """Whether a token is among the `count` i32[B] highest of score [B, K, S]; the first among equals is higher."""
        size = score.shape[-1]
        budget = self.budget * size if isinstance(self.budget, float) else self.budget
        most = min(math.ceil(self.first * budget), size)  # ranking all of a prompt costs more than the scores
        index = lax.top_k(score, most)[1]
        taken = jnp.where(jnp.arange(most)[None, None] < count[:, None, None], index, size)
        b, h = (jnp.arange(n) for n in score.shape[:2])
        return jnp.zeros(score.shape, bool).at[b[:, None, None], h[:, None], taken].set(True, mode="drop")
