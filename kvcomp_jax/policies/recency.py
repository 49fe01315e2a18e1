"""Newer is better."""

import jax
import jax.numpy as jnp

from kvcomp_jax.policies.base import Policy
from kvcomp_jax.types import pytree, static


@pytree
class Recency(Policy):
    """Keep the most recent tokens, and the first `num_sinks`.

    Of a prompt, the last `num_queries` queries are at hand when it is stored, for an index that ranks by them.
    Source: StreamingLLM, Xiao et al. 2023, arXiv:2309.17453 (with 4 sinks).
    """

    num_queries: int = static(default=0)

    def num_probes(self, capacity: int) -> int:
        """`num_queries`."""
        return min(self.num_queries, capacity)

    @property
    def fifo(self) -> bool:
        """True: first in, first out."""
        return True

    def score(self, stat: jax.Array | None, pos: jax.Array) -> jax.Array:
        """The position itself."""
        del stat
        return pos.astype(jnp.float32)
