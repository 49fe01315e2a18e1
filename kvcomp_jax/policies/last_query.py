"""Tokens that the latest query attends to."""

import jax
import jax.numpy as jnp

from kvcomp_jax.policies.base import Policy, Prompt, Stat, Step
from kvcomp_jax.types import pytree


@pytree
class LastQuery(Policy):
    """Rank by the attention of the latest query alone, averaged over all heads, which so keep the same tokens.

    Source: TOVA, Oren et al. 2024, arXiv:2401.06104, section 3.
    """

    @property
    def needs_probs(self) -> bool:
        """True: every step ranks anew."""
        return True

    def num_probes(self, capacity: int) -> int:
        """A prompt's last query."""
        del capacity
        return 1

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> jax.Array:
        """The last query's attention, f32[B, K, S]."""
        del stat
        return _over_heads(prompt.mass(prompt.kept.at))

    def fold(self, stat: Stat, probs: jax.Array, pos: jax.Array, step: Step) -> jax.Array:
        """Replace the attention by the last real query's."""
        del pos
        latest = jnp.argmax(step.pos, -1)[:, None, None, None, None]
        now = jnp.take_along_axis(probs, latest, 3)[:, :, :, 0].sum(2)
        return jnp.where((step.pos >= 0).any(-1)[:, None, None], _over_heads(now), stat)

    def score(self, stat: Stat | None, pos: jax.Array) -> jax.Array:
        """The attention itself."""
        if stat is None:
            raise TypeError("LastQuery.score needs the attention of the last query, got None.")
        del pos
        return stat


def _over_heads(mass: jax.Array) -> jax.Array:
    """The mean of mass f32[B, K, S] in every head: as good as that of probabilities, for ranking."""
    return jnp.broadcast_to(mass.mean(1, keepdims=True), mass.shape)
