"""Tokens that received the most attention so far."""

import jax

from kvcomp_jax.policies.base import Policy
from kvcomp_jax.types import pytree


@pytree
class HeavyHitter(Policy):
    """Rank by accumulated attention mass, summed over all queries seen and the query heads of a group.

    Never normalised by age, so older tokens are favoured; evicted tokens never return.
    Source: H2O, Zhang et al. 2023, arXiv:2306.14048, algorithm 1; grouped-query sum is ours.
    """

    @property
    def needs_probs(self) -> bool:
        """True: the statistic is the mass itself."""
        return True

    def observe(
        self, stat: jax.Array, mass: jax.Array, pos: jax.Array, length: jax.Array, num_new: jax.Array
    ) -> jax.Array:
        """Add the mass."""
        del pos, length, num_new
        return stat + mass

    def score(self, stat: jax.Array | None, pos: jax.Array) -> jax.Array:
        """The accumulated mass."""
        if stat is None:
            raise TypeError("HeavyHitter.score needs the accumulated mass, got None.")
        del pos
        return stat
