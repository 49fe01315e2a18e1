"""Tokens to which queries yet to come are expected to attend."""

import jax
import jax.numpy as jnp

from kvcomp_jax.policies.base import Probes, Prompt, Stat
from kvcomp_jax.policies.prompt_rank import PromptRank
from kvcomp_jax.rotary import Rotary
from kvcomp_jax.types import pytree, static


@pytree
class Moments:
    """Of the queries of a prompt so far, before their rotation, for each query head."""

    count: jax.Array  # f32[B], queries
    mean: jax.Array  # f32[B, K, G, D]
    spread: jax.Array  # f32[B, K, G, D, D], sum of the outer products of their distances from the mean


@pytree
class ExpectedAttention(PromptRank):
    """Rank by the attention that a normal distribution of queries gives a key, times the norm of its value.

    Mean m and covariance C are those of the prompt's queries before their rotation, sinks left out, for each query
    head; both are rotated by the mean rotation over the positions to come. A key's expected exp(q . k) is
    exp(m . k + k C k / 2); it is normalised over the prompt, averaged over a group, and multiplied by |v|.
    No query is kept: chunks add to the moments as they are read.

    Attributes:
      rope: How queries and keys are rotated; None for not at all.
      num_future: Positions after the prompt that are averaged over.
      use_covariance, use_values: Whether C and |v| count.

    Source: Expected Attention, Devoto et al. 2025, arXiv:2510.00636, section 3. Moments of chunks are joined as in
    Chan, Golub and LeVeque 1983, The American Statistician 37(3).
    """

    rope: Rotary | None = static(default=None)
    num_future: int = static(default=512)
    use_covariance: bool = static(default=True)
    use_values: bool = static(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_future < 1:
            raise ValueError(f"num_future={self.num_future} must be at least 1.")

    @property
    def watches(self) -> bool:
        """True: moments of all queries."""
        return True

    def new_watched(self, rows: tuple[int, int, int], head_dim: int, capacity: int) -> Moments:
        """The moments of no query."""
        del capacity
        return Moments(
            count=jnp.zeros(rows[0]),
            mean=jnp.zeros((*rows, head_dim)),
            spread=jnp.zeros((*rows, head_dim, head_dim)),
        )

    def watch(self, watched: Moments | None, chunk: Probes, capacity: int) -> Moments:
        """Add a chunk's queries, but for those of sinks, to the moments."""
        del capacity
        counted = (chunk.at >= self.num_sinks).astype(jnp.float32)  # [B, N]
        here = counted[:, None, None, :, None]
        count = counted.sum(-1)
        q = chunk.q
        if self.rope is not None:
            q = self.rope.undo(q, jnp.maximum(chunk.at, 0)[:, None, None])  # [B, K, G, N, D]
        mean = jnp.einsum("bn,bkgnd->bkgd", counted / jnp.maximum(count, 1.0)[:, None], q)
        apart = jnp.where(here > 0, q - mean[:, :, :, None], 0.0)
        spread = jnp.einsum("bkgnd,bkgne->bkgde", apart, apart)
        if watched is None:
            return Moments(count=count, mean=mean, spread=spread)
        total = watched.count + count
        share = (count / jnp.maximum(total, 1.0))[:, None, None, None]
        further = mean - watched.mean
        between = (watched.count[:, None, None, None] * share * further)[..., None] * further[..., None, :]
        return Moments(count=total, mean=watched.mean + share * further, spread=watched.spread + spread + between)

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> jax.Array:
        """The expected attention, f32[B, K, S]."""
        del stat
        place = jnp.arange(prompt.k.shape[2], dtype=jnp.int32)[None]
        real = ((place >= self.num_sinks) & (place < prompt.length[:, None]))[:, None]
        mean, cov = self._queries(prompt)

        total = jnp.zeros(prompt.k.shape[:3])
        ones = jnp.ones(prompt.k.shape[-1])
        heads = mean.shape[2]
        for g in range(heads):  # one query head of each group at a time, not in a loop of XLA's: half the time on CPU
            terms = jnp.broadcast_to(mean[:, :, g, None], prompt.k.shape)
            if self.use_covariance:
                half = 0.5 * cov[:, :, g]
                terms = terms + jnp.einsum("bksd,bkde->bkse", prompt.k, half, preferred_element_type=jnp.float32)
            logits = jnp.matmul(terms * prompt.k, ones, precision="highest")  # sums short rows faster than a sum does
            total += jax.nn.softmax(logits, -1, where=real)
        expected = total / heads
        if self.use_values:
            expected = expected * jnp.linalg.norm(prompt.v.astype(jnp.float32), axis=-1)
        return jnp.where(real, expected, 0.0)

    def _queries(self, prompt: Prompt) -> tuple[jax.Array, jax.Array]:
        """Mean f32[B, K, G, D] and covariance f32[B, K, G, D, D] of the queries to come."""
        seen = prompt.watched
        if not isinstance(seen, Moments):
            raise TypeError(f"ExpectedAttention judges by the moments of queries, got {type(seen).__name__}.")
        mean = self._to_come(seen.mean[..., None, :], prompt)[..., 0, :]
        cov = seen.spread / jnp.maximum(seen.count, 1.0)[:, None, None, None, None]
        half = self._to_come(cov, prompt).swapaxes(-1, -2)
        return mean, self._to_come(half, prompt)

    def _to_come(self, x: jax.Array, prompt: Prompt) -> jax.Array:
        """Rotate x [B, K, G, S, D] by the mean rotation of the positions after the prompt."""
        if self.rope is None:
            return x
        first = prompt.length.reshape(-1, 1, 1, 1)  # only differences of positions count, so the prompt begins at 0
        return self.rope.average(x, first, self.num_future)
