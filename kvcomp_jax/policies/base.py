"""The contract of a policy: which tokens are worth keeping."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.types import pytree, static
from pallas_kernels.prefill import probe_mass
from pallas_kernels.prefill.reference import capped, seen_from

Stat = Any  # what a policy remembers of each token: arrays [B, K, S, ...]
Watched = Any  # what a policy keeps of a prompt's queries until the prompt closes: `Probes`, or arrays [B, ...]


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
    watched: Watched | None  # as the policy's `watch` kept it
    soft_cap: float | None = static(default=None)
    start: jax.Array  # i32[B], text position of its first token
    output_norm: jax.Array | None = None  # f32[B, K, S], see `kvcomp_jax.outputs`; None if the policy asked for none
    sliding_window: int | None = static(default=None)

    def mass(self, at: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        """Attention that each key received, f32[B, K, S], summed over the heads of a group and the probes i32[B, N].

        Args:
          at: `probes.at`, with -1 where a probe shall not count.
          weight: f32[B, N], positive where it counts, how much each does; None = 1.
        """
        probes = self.kept
        options = {"soft_cap": self.soft_cap, "sliding_window": self.sliding_window}
        lse = probes.lse
        if weight is not None:
            lse = lse - jnp.log(jnp.where(at >= 0, weight, 1.0))[:, None, None]
        return probe_mass(probes.q, self.k, lse, at, **options)

    def mass_by_head(self, at: jax.Array) -> jax.Array:
        """As `mass`, but for each query head of a group alone: f32[B, K, G, S]."""
        probes, options = self.kept, {"soft_cap": self.soft_cap, "sliding_window": self.sliding_window}

        def one(head: tuple[jax.Array, jax.Array]) -> jax.Array:
            q, lse = head
            return probe_mass(q[:, :, None], self.k, lse[:, :, None], at, **options)

        return jnp.moveaxis(lax.map(one, (jnp.moveaxis(probes.q, 2, 0), jnp.moveaxis(probes.lse, 2, 0))), 0, 2)

    def probs(self, first: jax.Array | int, num: int) -> tuple[jax.Array, jax.Array]:
        """Attention of `num` of the probes from `first` on, f32[B, K, G, num, S], and where they stand, i32[B, num]."""
        q, lse = (lax.dynamic_slice_in_dim(x, first, num, 3) for x in (self.kept.q, self.kept.lse))
        at = lax.dynamic_slice_in_dim(self.kept.at, first, num, 1)
        logits = jnp.einsum("bkgnd,bksd->bkgns", q, self.k, preferred_element_type=jnp.float32)
        live = seen_from(at, jnp.arange(self.k.shape[2]), self.sliding_window)
        return jnp.where(live, jnp.exp(capped(logits, self.soft_cap) - lse[..., None]), 0.0), at

    def mean_probs(self, first: jax.Array | int, num: int) -> jax.Array:
        """Attention of the probes to `num` of the keys from `first` on, a mean over a group: f32[B, K, num, N]."""
        probes, k = self.kept, lax.dynamic_slice_in_dim(self.k, first, num, 2)
        live = seen_from(probes.at, first + jnp.arange(num), self.sliding_window)[:, :, 0].swapaxes(2, 3)
        total = jnp.zeros((*k.shape[:3], probes.at.shape[1]))
        for g in range(probes.q.shape[2]):  # one product for all takes XLA on CPU one and a half times as long
            logits = jnp.einsum("bksd,bknd->bksn", k, probes.q[:, :, g], preferred_element_type=jnp.float32)
            probs = jnp.exp(capped(logits, self.soft_cap) - probes.lse[:, :, g][:, :, None])
            total += jnp.where(live, probs, 0.0)
        return total / probes.q.shape[2]

    def peak(self, block: int = 32) -> jax.Array:
        """The greatest attention that each key received from any probe, any head of its group: f32[B, K, S]."""
        num = self.kept.at.shape[1]
        size = min(block, num)

        def raised(i: jax.Array, top: jax.Array) -> jax.Array:
            return jnp.maximum(top, self.probs(jnp.minimum(i * size, num - size), size)[0].max((2, 3)))

        return lax.fori_loop(0, -(-num // size), raised, jnp.zeros(self.k.shape[:3]))

    @property
    def kept(self) -> Probes:
        """The probes; TypeError if the policy asked for none."""
        if not isinstance(self.watched, Probes):
            raise TypeError("the policy kept no probes: num_probes must be positive.")
        return self.watched

    @property
    def projected(self) -> jax.Array:
        """`output_norm`; TypeError if the policy asked for none."""
        if self.output_norm is None:
            raise TypeError("the policy asked for no norms of outputs: weighs_outputs must be true.")
        return self.output_norm


@pytree
class Step:
    """The queries of a decode step, as a policy sees them."""

    pos: jax.Array  # i32[B, T], text positions, -1 = padding
    num_visible: jax.Array  # i32[B, K, T], tokens of the cache that each sees


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
        """Whether every token in the cache carries a statistic, from the prompt or from every step."""
        return self.needs_probs

    @property
    def admits_later(self) -> bool:
        """Whether tokens after the first prompt may settle; if not, they are evicted when they leave the window."""
        return True

    @property
    def pools_heads(self) -> bool:
        """Whether the KV heads of a row share its slots, as many for each as `least_share` and scores give it."""
        return False

    @property
    def judges_keys(self) -> bool:
        """Whether tokens are ranked by their keys, too, see `judge`."""
        return False

    @property
    def ranks_once(self) -> bool:
        """Whether tokens are ranked when they settle and never again, so that rungs keep no statistic."""
        return False

    @property
    def hands_on(self) -> bool:
        """Whether each layer chooses the tokens of a prompt that the next one sees, see `worth_passing`."""
        return False

    @property
    def rehearses(self) -> bool:
        """Whether a prompt is ranked by what the model attends to when it repeats it, see `Rehearsed`."""
        return False

    @property
    def weighs_outputs(self) -> bool:
        """Whether a prompt's values count by what the output projection makes of them: `Prompt.output_norm`."""
        return False

    @property
    def looks_at_prompt(self) -> bool:
        """Whether reading a prompt must do more for this policy than attend."""
        return self.keeps_stat or self.watches or self.weighs_outputs

    @property
    def watches(self) -> bool:
        """Whether it keeps something of a prompt's queries, see `watch`.

        Such a policy judges a prompt by that alone: `observe` then sees decoded tokens and later prompts only.
        """
        return self.num_probes(1) > 0

    def num_probes(self, capacity: int) -> int:
        """How many queries of a prompt of up to `capacity` tokens `from_prompt` wants to see; 0 = none."""
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

    def new_watched(self, rows: tuple[int, int, int], head_dim: int, capacity: int) -> Watched:
        """What `watch` keeps before any chunk of a prompt of up to `capacity` tokens; rows are (B, K, G)."""
        n = self.num_probes(capacity)
        return Probes(
            q=jnp.zeros((*rows, n, head_dim)), lse=jnp.zeros((*rows, n)), at=jnp.full((rows[0], n), -1, jnp.int32)
        )

    def watch(self, watched: Watched, chunk: Probes, capacity: int) -> Watched:
        """Keep what `from_prompt` will need of a chunk's queries; here those that `choose_probes` chooses.

        `watched` is what was kept so far, None where the whole prompt is one chunk.
        """
        seen = chunk
        if watched is not None:
            seen = Probes(
                q=jnp.concatenate([watched.q, chunk.q], 3),
                lse=jnp.concatenate([watched.lse, chunk.lse], 3),
                at=jnp.concatenate([watched.at, chunk.at], 1),
            )
        index = self.choose_probes(seen.at, capacity)
        rows = index[:, None, None]
        return Probes(
            q=jnp.take_along_axis(seen.q, rows[..., None], 3),
            lse=jnp.take_along_axis(seen.lse, rows, 3),
            at=jnp.take_along_axis(seen.at, index, 1),
        )

    def new_stat(self, slots: tuple[int, int, int]) -> Stat:
        """The statistic of `slots` (B, K, S) that no query has seen; zeros, because a new token's is set to zero."""
        return jnp.zeros(slots)

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> Stat:
        """Return the statistic by which a prompt's tokens are ranked, f32[B, K, S] or as `new_stat`.

        `stat` is what `observe` made of it, else as new; None where caches carry no statistic.
        """
        del prompt
        return stat

    def fold(self, stat: Stat, probs: jax.Array, pos: jax.Array, step: Step) -> Stat:
        """Take the attention of a decode step into the statistic; here only its sum over queries, by `observe`.

        Args:
          stat, pos: Of the tokens; pos i32[B, K or 1, S], -1 = none.
          probs: f32[B, K, G, T, S], 0 where a query is padding or does not see a token.
          step: The queries.
        """
        num_new = (step.pos >= 0).sum(-1)
        return self.observe(stat, probs.sum((2, 3)), pos, step.pos.max(-1) + 1, num_new)

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

    def score(self, stat: Stat | None, pos: jax.Array) -> jax.Array:
        """Worth of each token, f32 of the shape of `pos` i32[B, K or 1, S]; higher stays.

        `stat` is `from_prompt`'s for a prompt, and in a cache None if caches carry no statistic.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score.")

    def worth_passing(self, prompt: Prompt, tail: jax.Array) -> jax.Array:
        """Worth of a prompt's tokens to deeper layers, f32[B, S]; of its last `tail` i32[B] tokens infinite."""
        del prompt, tail
        raise NotImplementedError(f"{type(self).__name__} must define worth_passing.")

    def judge(self, stat: Stat | None, k: jax.Array, pos: jax.Array) -> jax.Array:
        """Worth of tokens that are ranked together, f32[B, K, S], from their keys, too: of prompts, and as rungs fill.

        Args:
          stat: As in `score`, which this is by default.
          k: [B, K, S, D], as stored. pos: i32[B, K, S], -1 = none.
        """
        del k
        return self.score(stat, pos)
