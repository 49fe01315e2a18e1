"""Tokens that recent queries look at and whose keys say what no other key says."""

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.orders import permute
from kvcomp_jax.policies.base import Policy, Prompt, Stat, Step
from kvcomp_jax.types import pytree, static

_BLOCK = 256  # keys compared with all others at a time


@pytree
class Distinct(Policy):
    """Rank by importance less redundancy: `weight` * I - (1 - `weight`) * R, where tokens are judged together.

    I is the attention of each of the last `num_queries` queries, the greatest of a group's heads, normalised over all
    tokens but the newest `num_queries`, averaged over the queries, and max-pooled along the text. R is a softmax over
    the tokens of the mean cosine similarity of a token's key to all others' in its head. Of the keys that a key is
    alike, by more than `threshold`, the newest is not charged for it, and so outlives its copies; where none is, the
    oldest of all.

    A token remembers the attention of each of these queries, in half precision.

    Attributes:
      num_queries: Queries that judge; they and what came with them are not judged.
      kernel_size: Neighbours pooled over, odd, itself included.
      weight: Of importance, in [0, 1].
      threshold: Cosine from which two keys are alike.

    Source: R-KV, Cai et al. 2025, arXiv:2505.24133, section 3, and its released code; there a group's logits are
    maximised before the softmax, here its probabilities after it.
    """

    num_queries: int = static(default=8)
    kernel_size: int = static(default=7)
    weight: float = static(default=0.1)
    threshold: float = static(default=0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_queries < 1:
            raise ValueError(f"num_queries={self.num_queries} must be at least 1.")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd and positive.")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight} of importance must be in [0, 1].")

    @property
    def needs_probs(self) -> bool:
        """True: the last queries are remembered."""
        return True

    @property
    def judges_keys(self) -> bool:
        """True: redundancy is a matter of keys."""
        return True

    def new_stat(self, slots: tuple[int, int, int]) -> jax.Array:
        """No attention: f16[B, K, S, num_queries], that of the query at `pos` in place pos % num_queries."""
        return jnp.zeros((*slots, self.num_queries), jnp.float16)

    def num_probes(self, capacity: int) -> int:
        """The last queries."""
        return min(self.num_queries, capacity)

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> jax.Array:
        """Record the probes."""
        del stat
        probs, at = prompt.probs(0, prompt.kept.at.shape[1])
        pos = jnp.where(at >= 0, at + prompt.start[:, None], -1)
        return self._record(self.new_stat(prompt.k.shape[:3]), probs.max(2), pos)

    def fold(self, stat: Stat, probs: jax.Array, pos: jax.Array, step: Step) -> jax.Array:
        """Record the queries of a step in place of those `num_queries` before them."""
        del pos
        return self._record(stat, probs.max(2), step.pos)

    def score(self, stat: Stat | None, pos: jax.Array) -> jax.Array:
        """The mean attention of the last queries, where keys are not at hand."""
        if stat is None:
            raise TypeError("Distinct.score needs the attention of the last queries, got None.")
        del pos
        return stat.astype(jnp.float32).mean(-1)

    def judge(self, stat: Stat | None, k: jax.Array, pos: jax.Array) -> jax.Array:
        """Importance less redundancy, f32[B, K, S]."""
        if stat is None:
            raise TypeError("Distinct.judge needs the attention of the last queries, got None.")
        order = jnp.argsort(jnp.where(pos >= 0, pos, jnp.iinfo(jnp.int32).max), -1)  # along the text, the empty last
        pos, k, stat = (permute(x, order) for x in (pos, k, stat))
        score = self.weight * self._importance(stat, pos) - (1 - self.weight) * self._redundancy(k, pos >= 0)
        return permute(score, jnp.argsort(order, -1))

    def _record(self, stat: jax.Array, probs: jax.Array, pos: jax.Array) -> jax.Array:
        """Put probs f32[B, K, n, S] of queries at pos i32[B, n], -1 = none, in their places, the newest if many."""
        newest = (pos >= 0) & (pos > pos.max(-1, keepdims=True) - self.num_queries)
        here = newest[..., None] & jax.nn.one_hot(pos % self.num_queries, self.num_queries, dtype=bool)  # [B, n, Q]
        new = jnp.einsum("bkns,bnq->bksq", probs, here.astype(probs.dtype))
        return jnp.where(here.any(1)[:, None, None], new.astype(stat.dtype), stat)

    def _importance(self, stat: jax.Array, pos: jax.Array) -> jax.Array:
        """Pooled mean attention f32[B, K, S] to tokens in the order of the text."""
        judged = (pos >= 0) & (pos <= pos.max(-1, keepdims=True) - self.num_queries)
        received = jnp.where(judged[..., None], stat.astype(jnp.float32), 0.0)
        mean = (received / jnp.maximum(received.sum(2, keepdims=True), 1e-30)).mean(-1)
        shape, half = (1, 1, self.kernel_size), self.kernel_size // 2
        return lax.reduce_window(mean, -jnp.inf, lax.max, shape, (1, 1, 1), ((0, 0), (0, 0), (half, half)))

    def _redundancy(self, k: jax.Array, live: jax.Array) -> jax.Array:
        """Softmax f32[B, K, S] over live tokens of their keys' mean similarity to the others."""
        k = k.astype(jnp.float32)
        unit = jnp.where(live[..., None], k / (jnp.linalg.norm(k, axis=-1, keepdims=True) + 1e-8), 0.0)
        num_slots = k.shape[2]
        size = min(_BLOCK, num_slots)
        place = jnp.arange(num_slots)

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            first = jnp.minimum(i * size, num_slots - size)
            rows = first + jnp.arange(size)
            alike = jnp.einsum("bkrd,bksd->bkrs", lax.dynamic_slice_in_dim(unit, first, size, 2), unit)
            alike = jnp.where((rows[:, None] == place[None])[None, None], 0.0, alike)
            newest = (jnp.where(alike > self.threshold, 1, 0) * place[None, None, None]).max(-1)
            again = rows < i * size  # the last block may reach back
            charged = ~jax.nn.one_hot(newest, num_slots, dtype=bool) & ~again[None, None, :, None]
            return total + jnp.where(charged, alike, 0.0).sum(2)

        total = lax.fori_loop(0, -(-num_slots // size), add, jnp.zeros(k.shape[:3]))
        mean = total / jnp.maximum(live.sum(-1, keepdims=True), 1)
        return jnp.where(live, jax.nn.softmax(mean, -1, where=live), 0.0)
