"""The contract of a policy: which tokens are worth keeping."""

import jax
from jax import lax

from kvcomp_jax.types import pytree, static
from pallas_kernels.prefill import probe_mass


@pytree
class Probes:
    """Queries of a prompt by which a policy judges its keys."""

    q: jax.Array  # f32[B, K, G, N, D], scaled
    lse: jax.Array  # f32[B, K, G, N], log of their softmax denominators
    at: jax.Array  # i32[B, N], place in the prompt, -1 = none


@pytree
class Prompt:
    """A whole prompt, as a policy sees it before it is compressed."""

    k: jax.Array  # [B, K, S, D], keys as cached
    v: jax.Array  # [B, K, S, D]
    length: jax.Array  # i32[B], tokens of each row
    probes: Probes | None  # as `num_probes` and `choose_probes` had them kept
    soft_cap: float | None = static(default=None)
    sliding_window: int | None = static(default=None)

    def mass(self, at: jax.Array) -> jax.Array:
        """Attention that each key received, f32[B, K, S], summed over the heads of a group and the probes i32[B, N].

        Args:
          at: `probes.at`, with -1 where a probe shall not count.
        """
        if self.probes is None:
            raise TypeError("the policy kept no probes: num_probes must be positive.")
        options = {"soft_cap": self.soft_cap, "sliding_window": self.sliding_window}
        return probe_mass(self.probes.q, self.k, self.probes.lse, at, **options)


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

    @property
    def keeps_stat(self) -> bool:
        """Whether every token carries a statistic, f32[B, K, S], from the prompt or from every step."""
        return self.needs_probs

    @property
    def looks_at_prompt(self) -> bool:
        """Whether reading a prompt must do more for this policy than attend."""
        return self.keeps_stat or self.num_probes(1) > 0

    def num_probes(self, capacity: int) -> int:
        """How many queries of a prompt of up to `capacity` tokens `from_prompt` wants to see; 0 = none.

        A policy with probes judges a prompt by them alone: `observe` then sees decoded tokens and later prompts only.
        """
        del capacity
        return 0

    def choose_probes(self, at: jax.Array, capacity: int) -> jax.Array:
        """Indices of the queries to keep among those at places i32[B, N] of the prompt, -1 = none.

        It is asked again with every chunk, for those kept so far and the chunk's. What is left out must therefore be
        what the whole prompt would leave out, too: keep the latest, or the lowest of some hash. Here: the latest.

        Returns:
          i32[B, num_probes(capacity)], or all N if there are fewer.
        """
        return lax.top_k(at, min(self.num_probes(capacity), at.shape[1]))[1]

    def from_prompt(self, stat: jax.Array, prompt: Prompt) -> jax.Array:
        """Return the statistic f32[B, K, S] of a prompt's tokens; `stat` is what `observe` made of it, else zeros."""
        del prompt
        return stat

    def observe(
        self, stat: jax.Array, mass: jax.Array, pos: jax.Array, length: jax.Array, num_new: jax.Array
    ) -> jax.Array:
        """Fold the mass f32[B, K, S] that tokens just received into their statistic f32[B, K, S].

        Args:
          stat, mass, pos: Of the tokens; pos i32[B, K or 1, S], -1 = none.
          length: i32[B], tokens that each row has read, those included whose queries gave this mass.
          num_new: i32[B], how many these are.
        """
        del mass, pos, length, num_new
        return stat

    def score(self, stat: jax.Array | None, pos: jax.Array) -> jax.Array:
        """Worth of each token, f32 of the shape of `pos` i32[B, K or 1, S]; higher stays."""
        raise NotImplementedError(f"{type(self).__name__} must define score.")
