"""Tokens that stay important: seldom below average in the recent past."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.policies.base import Policy, Probes, Prompt, Stat, Step
from kvcomp_jax.types import pytree, static

_WORD = 32  # queries a word
_KEYS = 512  # of a prompt looked at together; on CPU 128 take 1.4 to 1.9 times as long, 1024 1.1 to 1.4
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
        return History(low=jnp.zeros((*slots, -(-self.history // _WORD)), jnp.uint32), mean=jnp.zeros(slots))

    def num_probes(self, capacity: int) -> int:
        """The history."""
        return min(self.history, capacity)

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> History:
        """Record the probes, for some keys at a time."""
        del stat
        prompt = dataclasses.replace(prompt, watched=self._by_column(prompt.kept, prompt.start))
        slots = prompt.k.shape[2]
        size, at = min(_KEYS, slots), prompt.kept.at[:, None, None]
        seen = at + 1 if prompt.sliding_window is None else jnp.minimum(at + 1, prompt.sliding_window)
        bits = _bit(jnp.arange(at.shape[-1]))[None, None, None]

        def record(i: jax.Array, history: History) -> History:
            first = jnp.minimum(i * size, slots - size)  # the last block may reach back
            alpha = prompt.mean_probs(first, size)
            sees = (at >= (first + jnp.arange(size))[None, None, :, None]) & (at >= 0)  # [B, 1, S, N]
            low = jnp.where(sees & (alpha * seen < 1), bits, 0)
            new = History(
                low=_any_of(low.reshape(*low.shape[:3], -1, _WORD), 4),
                mean=alpha.sum(3) / jnp.maximum(sees.sum(3), 1),
            )
            return jax.tree.map(lambda old, x: lax.dynamic_update_slice_in_dim(old, x, first, 2), history, new)

        return lax.fori_loop(0, -(-slots // size), record, self.new_stat(prompt.k.shape[:3]))

    def _by_column(self, probes: Probes, start: jax.Array) -> Probes:
        """One probe for each bit of the words, or none, by the text position of its query."""
        wanted = jnp.arange(-(-self.history // _WORD) * _WORD)[None, :, None]  # bits past `history` are of no query
        column = jnp.where(probes.at >= 0, (probes.at + start[:, None]) % self.history, -1)
        mine = column[:, None] == wanted  # [B, columns, N]
        which = mine.argmax(-1)
        q, lse = jax.vmap(lambda q, lse, i: (q[:, :, i], lse[:, :, i]))(probes.q, probes.lse, which)
        at = jnp.where(mine.any(-1), jnp.take_along_axis(probes.at, which, 1), -1)
        return Probes(q=q, lse=lse, at=at)

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
        here = (column // _WORD)[..., None] == jnp.arange(words.shape[-1])[None, None]  # [B, n, words]
        bit = jnp.where(here & (pos >= 0)[..., None], _bit(column)[..., None], 0)
        mine = _any_of(bit, 1)[:, None, None]
        each = jnp.where(low[..., None], bit[:, None, :, None], 0)  # [B, K, n, S, words]
        return (words & ~mine) | _any_of(each, 2)


def _bit(column: jax.Array) -> jax.Array:
    """The bit of a query in its word, u32."""
    return jnp.uint32(1) << (column % _WORD).astype(jnp.uint32)


def _any_of(words: jax.Array, axis: int) -> jax.Array:
    """Bits that are set in any of `words` u32 along `axis`."""
    return lax.reduce(words, jnp.uint32(0), lax.bitwise_or, (axis,))
