"""Tokens of a prompt that its tail agrees on, layer after layer; of later ones those that newer tokens look at."""

import jax
import jax.numpy as jnp

from kvcomp_jax.policies.base import Policy, Prompt, Stat, Step
from kvcomp_jax.types import pytree, static


@pytree
class Received:
    """What a token received from the queries since it came; of the prompt's own tokens mass is infinite."""

    mass: jax.Array  # f32[B, K, S], sum of attention, averaged over heads
    moment: jax.Array  # f32[B, K, S], the same, each times the query's distance
    age: jax.Array  # f32[B, K, S], distance of the last query


@pytree
class TailVote(Policy):
    """Hand on to the next layer the tokens to which a prompt's tail attends; thin what comes later by the block.

    Inside a prompt each layer passes on its tail, the first `num_first` tokens, and those between with the highest
    attention from the tail, averaged over all heads and over the tail's queries, whose weights rise linearly from 1 to
    `newest`. A cache keeps all that its layer saw. Later tokens are ranked among those that leave the window with them,
    by the attention since they came, with the same weights over the window's queries. All heads keep the same tokens.

    Attributes:
      num_queries: Tokens of the longest prompt's tail. A row's own tail is its window.
      num_first: Tokens that are always passed on.
      newest: Weight of the newest query's attention; the oldest's is 1.

    Source: PyramidInfer, Yang et al. 2024, arXiv:2405.12532, and its released code. Running sums stand in for its
    matrix of recent rows, so that a token of a block also hears queries older than the window, fewer than a block.
    """

    num_queries: int = static(default=1)
    num_first: int = static(default=4)
    newest: float = static(default=1.2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_queries < 1 or self.num_first < 0:
            raise ValueError(f"num_queries={self.num_queries} must be >= 1 and num_first={self.num_first} >= 0.")

    @property
    def needs_probs(self) -> bool:
        """True: later tokens are ranked by attention."""
        return True

    @property
    def ranks_once(self) -> bool:
        """True: what has settled stays."""
        return True

    @property
    def hands_on(self) -> bool:
        """True."""
        return True

    def num_probes(self, capacity: int) -> int:
        """The tail."""
        return min(self.num_queries, capacity)

    def new_stat(self, slots: tuple[int, int, int]) -> Received:
        """Nothing received."""
        return Received(mass=jnp.zeros(slots), moment=jnp.zeros(slots), age=jnp.zeros(slots))

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> Received:
        """A prompt's tokens are never thinned."""
        del stat
        empty = self.new_stat(prompt.k.shape[:3])
        return Received(mass=jnp.full_like(empty.mass, jnp.inf), moment=empty.moment, age=empty.age)

    def worth_passing(self, prompt: Prompt, tail: jax.Array) -> jax.Array:
        """Weighted mean attention from the last `tail` i32[B] tokens; of the tail and the first ones infinite."""
        at, first = prompt.kept.at, (prompt.length - tail)[:, None]
        weight = 1 + (self.newest - 1) * (at - first) / jnp.maximum(tail - 1, 1)[:, None]
        mass = prompt.mass(jnp.where(at >= first, at, -1), weight).sum(1)
        num_heads = prompt.kept.q.shape[1] * prompt.kept.q.shape[2]
        place = jnp.arange(prompt.k.shape[2])[None]
        always = (place < self.num_first) | (place >= first)
        score = jnp.where(always, jnp.inf, mass / num_heads / jnp.maximum(tail, 1)[:, None])
        return jnp.where(place < prompt.length[:, None], score, -jnp.inf)

    def fold(self, stat: Stat, probs: jax.Array, pos: jax.Array, step: Step) -> Received:
        """Add the attention of a step."""
        ago = (step.pos[:, None, :, None] - pos[:, :, None]).astype(jnp.float32)  # [B, K or 1, T, S]
        each = probs.mean((1, 2))[:, None]  # [B, 1, T, S]
        sees = (step.pos[:, None, :, None] >= pos[:, :, None]) & (step.pos >= 0)[:, None, :, None]
        mass, moment = each.sum(2), (each * ago).sum(2)
        age = jnp.where(sees, ago, 0.0).max(2)
        return Received(mass=stat.mass + mass, moment=stat.moment + moment, age=jnp.maximum(stat.age, age))

    def score(self, stat: Stat | None, pos: jax.Array) -> jax.Array:
        """The weighted mass; on a rung, where it is forgotten, first come, first kept."""
        if stat is None:
            return -pos.astype(jnp.float32)
        place = pos.astype(jnp.float32)
        first = place.max(-1, keepdims=True) + 1  # the window's first token, when the block leaves it
        steps = jnp.maximum(place + stat.age - first, 1.0)  # from there to the newest query
        ramp = stat.mass + (self.newest - 1) * (stat.moment + stat.mass * (place - first)) / steps
        return jnp.where(jnp.isinf(stat.mass), jnp.inf, ramp)
