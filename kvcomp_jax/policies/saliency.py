"""Tokens that receive the most attention from each query that can see them."""

from typing import Literal, cast

import jax
import jax.numpy as jnp

from kvcomp_jax.policies.base import Policy, Prompt, Stat
from kvcomp_jax.policies.draw import hashed
from kvcomp_jax.types import pytree, static


@pytree
class Saliency(Policy):
    """Rank by attention mass divided by the number of queries that could see a token.

    A causal mask favours early tokens in sums of attention; the division takes that away. In a prompt only probes are
    counted: the most recent queries and others drawn at random from those before, so the main attention stays fused.
    Decoded tokens carry the mean over the queries since they came.

    Random means: the lowest hashes of the place, so that neither chunks nor other rows change the draw. Counts follow
    each row's own length, and there is at least one recent probe.

    Attributes:
      recent, random: Shares of a prompt's queries that are probes, to a thousandth.
      divide_by: "probes" that can see a token, as the paper has it, or "queries" of the whole prompt, as its released
        code does: the last tokens, seen by few, then rank higher.

    Source: ZipCache, He et al. 2024, arXiv:2405.14256, sections 4.3 and 4.4; the sum over the query heads of a group
    is the released code's.
    """

    recent: float = static(default=0.05)
    random: float = static(default=0.05)
    divide_by: Literal["probes", "queries"] = static(default="probes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.recent <= 1 and 0 <= self.random <= 1):
            raise ValueError(f"recent={self.recent} and random={self.random} are shares of the queries, in [0, 1].")
        if self.divide_by not in ("probes", "queries"):
            raise ValueError(f"divide_by={self.divide_by!r} must be 'probes' or 'queries'.")

    @property
    def needs_probs(self) -> bool:
        """True: while decoding, the statistic follows the mass."""
        return True

    def num_probes(self, capacity: int) -> int:
        """The shares of `capacity`."""
        wanted = _at_least_one(capacity, self.recent) + _share(capacity, self.random)
        return min(cast(int, wanted), capacity)

    def choose_probes(self, at: jax.Array, capacity: int) -> jax.Array:
        """The latest, as many as a prompt of `capacity` tokens has recent probes, and the lowest hashes of the rest."""
        latest = _rank(-at) < _at_least_one(capacity, self.recent)
        kind = jnp.where(at < 0, 2, jnp.where(latest, 0, 1))
        return jnp.lexsort((hashed(at), kind))[:, : self.num_probes(capacity)]

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> jax.Array:
        """Divide the mass from the row's probes."""
        del stat
        if prompt.watched is None:
            raise TypeError("Saliency needs the prompt's probes, got None.")
        at = self._of_length(prompt.kept.at, prompt.length[:, None])
        place = jnp.arange(prompt.k.shape[2], dtype=jnp.int32)[None]
        if self.divide_by == "queries":
            seen_by = prompt.length[:, None] - place
        else:
            seen_by = _num_probes_seeing(at, place.shape[1], prompt.sliding_window)
        return prompt.mass(at) / jnp.maximum(seen_by, 1)[:, None]

    def observe(
        self, stat: jax.Array, mass: jax.Array, pos: jax.Array, length: jax.Array, num_new: jax.Array
    ) -> jax.Array:
        """Take the new queries into the mean over all that came since the token."""
        seen_by = jnp.maximum(length[:, None, None] - pos, 1)
        new = jnp.minimum(num_new[:, None, None], seen_by)
        return jnp.where(new > 0, stat + (mass - new * stat) / seen_by, stat)

    def score(self, stat: jax.Array | None, pos: jax.Array) -> jax.Array:
        """The mean mass from a query."""
        if stat is None:
            raise TypeError("Saliency.score needs the mean mass, got None.")
        del pos
        return stat

    def _of_length(self, at: jax.Array, length: jax.Array) -> jax.Array:
        """The probes i32[B, N] of prompts of length i32[B, 1], -1 in place of others."""
        first_recent = length - _at_least_one(length, self.recent)
        recent = (at >= 0) & (at >= first_recent)
        others = (at >= 0) & ~recent
        drawn = jnp.argsort(jnp.lexsort((hashed(at), ~others)), -1) < _share(length, self.random)
        return jnp.where(recent | (others & drawn), at, -1)


def _num_probes_seeing(at: jax.Array, num_slots: int, sliding_window: int | None) -> jax.Array:
    """How many of the probes i32[B, N] see each place: i32[B, S]."""
    rows, place = jnp.arange(at.shape[0])[:, None], jnp.where(at >= 0, at, num_slots)
    there = jnp.zeros((at.shape[0], num_slots), jnp.int32).at[rows, place].add(1, mode="drop")
    here_or_later = jnp.cumsum(there[:, ::-1], -1)[:, ::-1]
    if sliding_window is None:
        return here_or_later
    beyond = here_or_later[:, sliding_window:]
    return here_or_later - jnp.pad(beyond, ((0, 0), (0, num_slots - beyond.shape[1])))


def _share(num: int | jax.Array, share: float) -> int | jax.Array:
    """The whole part of a share, to a thousandth, of a number below two million: exact in integers."""
    return num * round(share * 1000) // 1000


def _at_least_one(num: int | jax.Array, share: float) -> int | jax.Array:
    part = _share(num, share)
    return max(part, 1) if isinstance(part, int) else jnp.maximum(part, 1)


def _rank(x: jax.Array) -> jax.Array:
    """Place of each element of x [B, N] in ascending order; among equals the first comes first."""
    return jnp.argsort(jnp.argsort(x, -1, stable=True), -1)
