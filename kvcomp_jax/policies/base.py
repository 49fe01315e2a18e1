"""The contract of a policy: which tokens are worth keeping."""

import jax

from kvcomp_jax.types import pytree, static


@pytree
class Policy:
    """Rank tokens; the ladder keeps the highest scores on its upper rungs and lets the lowest fall off its end.

    The first `num_sinks` tokens of a row are outside the ranking: they stay exact, in a buffer of their own, for ever.
    """

    num_sinks: int = static(default=0)

    def __post_init__(self) -> None:
        if self.num_sinks < 0:
            raise ValueError(f"num_sinks={self.num_sinks} must not be negative.")

    @property
    def fifo(self) -> bool:
        """Whether age alone decides, so that positions follow from counters and need no storage."""
        return False

    @property
    def needs_probs(self) -> bool:
        """Whether `observe` wants the attention mass of every token at every step."""
        return False

    def observe(self, stat: jax.Array, mass: jax.Array, pos: jax.Array) -> jax.Array:
        """Fold the mass f32[B, K, S] that tokens just received into their statistic f32[B, K, S]."""
        del mass, pos
        return stat

    def score(self, stat: jax.Array | None, pos: jax.Array) -> jax.Array:
        """Worth of each token, f32 of the shape of `pos` i32[B, K or 1, S]; higher stays."""
        raise NotImplementedError(f"{type(self).__name__} must define score.")
