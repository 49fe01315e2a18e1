"""Tokens to which queries yet to come are expected to attend."""

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.policies.base import Prompt, Stat
from kvcomp_jax.policies.draw import hashed
from kvcomp_jax.policies.prompt_rank import PromptRank
from kvcomp_jax.rotary import Rotary
from kvcomp_jax.types import pytree, static


@pytree
class ExpectedAttention(PromptRank):
    """Rank by the attention that a normal distribution of queries gives a key, times the norm of its value.

    Mean m and covariance C are those of the prompt's queries before their rotation, sinks left out, for each query
    head; both are rotated by the mean rotation over the positions to come. A key's expected exp(q . k) is
    exp(m . k + k C k / 2); it is normalised over the prompt, averaged over a group, and multiplied by |v|.

    Attributes:
      rope: How queries and keys are rotated; None for not at all.
      num_future: Positions after the prompt that are averaged over.
      num_queries: Queries of a prompt that are looked at, drawn at random from longer ones.
      use_covariance, use_values: Whether C and |v| count.

    Source: Expected Attention, Devoto et al. 2025, arXiv:2510.00636, section 3; kvpress looks at all queries.
    """

    rope: Rotary | None = static(default=None)
    num_future: int = static(default=512)
    num_queries: int = static(default=1024)
    use_covariance: bool = static(default=True)
    use_values: bool = static(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_future < 1 or self.num_queries < 1:
            raise ValueError(f"num_future={self.num_future} and num_queries={self.num_queries} must be at least 1.")

    def num_probes(self, capacity: int) -> int:
        """All queries, up to `num_queries`."""
        return min(self.num_queries, capacity)

    def choose_probes(self, at: jax.Array, capacity: int) -> jax.Array:
        """The lowest hashes of their places."""
        return jnp.lexsort((hashed(at), at < 0))[:, : self.num_probes(capacity)]

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> jax.Array:
        """The expected attention, f32[B, K, S]."""
        del stat
        place = jnp.arange(prompt.k.shape[2], dtype=jnp.int32)[None]
        real = ((place >= self.num_sinks) & (place < prompt.length[:, None]))[:, None]
        mean, cov = self._queries(prompt)

        def one(head: tuple[jax.Array, jax.Array]) -> jax.Array:  # one query head of each group at a time
            m, c = head
            logits = jnp.einsum("bksd,bkd->bks", prompt.k, m, preferred_element_type=jnp.float32)
            if self.use_covariance:
                spread = jnp.einsum("bksd,bkde->bkse", prompt.k, c, preferred_element_type=jnp.float32)
                logits = logits + 0.5 * (spread * prompt.k).sum(-1)
            return jax.nn.softmax(logits, -1, where=real)

        expected = lax.map(one, (jnp.moveaxis(mean, 2, 0), jnp.moveaxis(cov, 2, 0))).mean(0)
        if self.use_values:
            expected = expected * jnp.linalg.norm(prompt.v.astype(jnp.float32), axis=-1)
        return jnp.where(real, expected, 0.0)

    def _queries(self, prompt: Prompt) -> tuple[jax.Array, jax.Array]:
        """Mean f32[B, K, G, D] and covariance f32[B, K, G, D, D] of the queries to come."""
        at = prompt.kept.at
        counted = at >= self.num_sinks
        pos = (at + prompt.start[:, None])[:, None, None]
        q = prompt.kept.q if self.rope is None else self.rope.undo(prompt.kept.q, pos)  # [B, K, G, N, D]
        weight = counted / jnp.maximum(counted.sum(-1, keepdims=True), 1)
        mean = jnp.einsum("bn,bkgnd->bkgd", weight, q)
        apart = jnp.where(counted[:, None, None, :, None], q - mean[:, :, :, None], 0.0)
        cov = jnp.einsum("bn,bkgnd,bkgne->bkgde", weight, apart, apart)
        mean = self._to_come(mean[..., None, :], prompt)[..., 0, :]
        half = self._to_come(cov, prompt).swapaxes(-1, -2)
        return mean, self._to_come(half, prompt)

    def _to_come(self, x: jax.Array, prompt: Prompt) -> jax.Array:
        """Rotate x [B, K, G, S, D] by the mean rotation of the positions after the prompt."""
        if self.rope is None:
            return x
        first = (prompt.start + prompt.length).reshape(-1, 1, 1, 1)
        return self.rope.average(x, first, self.num_future)
