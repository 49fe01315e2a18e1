"""Tokens that stay important: seldom below average in the recent past."""

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.policies.base import Policy, Prompt, Stat, Step
from kvcomp_jax.types import pytree, static

_BLOCK = 16  # probes of a prompt looked at together
_OCTAVES = 40  # below 2^-40 of a query's attention, tokens are alike


@pytree
class History:
    """What the last queries thought of each token."""

    low: jax.Array  # u32[B, K, S, words], bit `pos % history` of a query says whether the token was below average
    mean: jax.Array  # f32[B, K, S], mean attention from these queries


@pytree
class Persistence(Policy):
    """Rank by how few of the last `history` queries paid a token less than uniform attention, 1 / (tokens they see).

    A query's attention is averaged over the heads of a group first. Among equals, the lower mean attention goes first,
    whatever their age; past `history` queries this mean decays exponentially instead of forgetting one query a time. A
    token younger than `history` is judged by the queries it has lived through, so it looks less bad.
    In a prompt, its last `history` queries count.

    Source: Scissorhands, Liu et al. 2023, arXiv:2305.17118, algorithm 2; grouped heads and ties are ours.
    """

    history: int = static(default=400)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"history={self.history} must be at least 1 query.")

    @property
    def needs_probs(self) -> bool:
        """True: every query is recorded."""
        return True

    def new_stat(self, slots: tuple[int, int, int]) -> History:
        """Nothing recorded."""
        return History(low=jnp.zeros((*slots, -(-self.history // 32)), jnp.uint32), mean=jnp.zeros(slots))

    def num_probes(self, capacity: int) -> int:
        """The history."""
        return min(self.history, capacity)

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> History:
        """Record the probes, some at a time."""
        del stat
        place = jnp.arange(prompt.k.shape[2], dtype=jnp.int32)[None, None]
        num_probes = prompt.kept.at.shape[1]
        size = min(_BLOCK, num_probes)

        def record(i: jax.Array, sofar: tuple[History, jax.Array]) -> tuple[History, jax.Array]:
            first = jnp.minimum(i * size, num_probes - size)
            probs, at = prompt.probs(first, size)
            at = jnp.where(first + jnp.arange(size)[None] >= i * size, at, -1)  # the last block may reach back
            seen = at + 1 if prompt.sliding_window is None else jnp.minimum(at + 1, prompt.sliding_window)
            pos = jnp.where(at >= 0, at + prompt.start[:, None], -1)
            before, count = sofar
            sees = (at[:, None, :, None] >= place[:, :, None]) & (at >= 0)[:, None, :, None]  # [B, 1, n, S]
            alpha = jnp.where(sees, probs.mean(2), 0.0)
            low = self._record(before.low, sees & (alpha * seen[:, None, :, None] < 1), pos)
            return History(low=low, mean=before.mean + alpha.sum(2)), count + sees.sum(2)

        start = (self.new_stat(prompt.k.shape[:3]), jnp.zeros((prompt.k.shape[0], 1, prompt.k.shape[2]), jnp.int32))
        total, count = lax.fori_loop(0, -(-num_probes // size), record, start)
        return History(low=total.low, mean=total.mean / jnp.maximum(count, 1))

    def fold(self, stat: Stat, probs: jax.Array, pos: jax.Array, step: Step) -> History:
        """Record the queries of a step in place of those `history` before them."""
        query = step.pos[:, None, :, None]
        sees = (query >= pos[:, :, None]) & (pos >= 0)[:, :, None] & (query >= 0)  # [B, K, T, S]
        alpha = probs.mean(2)
        low = self._record(stat.low, sees & (alpha * step.num_visible[..., None] < 1), step.pos)
        age = jnp.maximum(step.pos.max(-1)[:, None, None] + 1 - pos, 1)
        new = alpha.sum(2) - sees.sum(2) * stat.mean
        mean = stat.mean + new / jnp.minimum(age, self.history)
        return History(low=low, mean=jnp.where(sees.any(2), mean, stat.mean))

    def score(self, stat: Stat | None, pos: jax.Array) -> jax.Array:
        """Minus the times that a token was below average; the order of mean attention within one."""
        if stat is None:
            raise TypeError("Persistence.score needs the history, got None.")
        del pos
        times = lax.population_count(stat.low).astype(jnp.int32).sum(-1)
        among_equals = (jnp.log2(jnp.maximum(stat.mean, 2.0**-_OCTAVES)) + _OCTAVES) / (_OCTAVES + 1)
        return among_equals - times.astype(jnp.float32)

    def _record(self, words: jax.Array, low: jax.Array, pos: jax.Array) -> jax.Array:
        """Overwrite the bits of queries at pos i32[B, n], -1 = none, with low bool[B, K, n, S]."""
        column = pos % self.history
        here = (column // 32)[..., None] == jnp.arange(words.shape[-1])[None, None]  # [B, n, words]
        bit = jnp.where(here & (pos >= 0)[..., None], jnp.uint32(1) << (column % 32).astype(jnp.uint32)[..., None], 0)
        mine = lax.reduce(bit, jnp.uint32(0), lax.bitwise_or, (1,))[:, None, None]
        each = jnp.where(low[..., None], bit[:, None, :, None], 0)  # [B, K, n, S, words]
        return (words & ~mine) | lax.reduce(each, jnp.uint32(0), lax.bitwise_or, (2,))
