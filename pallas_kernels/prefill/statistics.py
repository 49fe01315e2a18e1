"""What policies need to know of a chunk: who voted for which keys, and how large the keys' channels are.

A query's probabilities are known only after its last key, so votes take a second look at the keys; but only the queries
that vote take it, and w of T queries cost w / T of the products. Nothing of T x S is stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.prefill.api import mass, prefill, probe_mass


class Statistics(NamedTuple):
    """Of one chunk; what was not asked for is None. All three add up over chunks."""

    votes: jax.Array | None = None  # f32[B, K, S], mass from the chunk's last queries
    probed: jax.Array | None = None  # f32[B, K, S], mass from the probes
    key_squares: jax.Array | None = None  # f32[B, K, D], squared norm of each channel of the chunk's keys


def prefill_with_statistics(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    last_window: int = 0,
    probes: jax.Array | None = None,
    key_norms: bool = False,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Statistics]:
    """Run `prefill` and take the `statistics` of attention to these keys alone."""
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    how = {"implementation": implementation, "interpret": interpret}
    state = prefill(q, k, v, start, **options, **how)
    _, top, total = state
    lse = top + jnp.log(jnp.where(total > 0, total, 1.0))
    wanted = {"last_window": last_window, "probes": probes, "key_norms": key_norms}
    return state, statistics(q, k, lse, start, length, **wanted, **options, **how)


def statistics(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    last_window: int = 0,
    probes: jax.Array | None = None,
    key_norms: bool = False,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Statistics:
    """Take statistics of a chunk whose softmax denominators are known.

    Args:
      q, k, lse, start, length, soft_cap, sliding_window: As in `mass`.
      last_window: Queries at the end of each row's chunk whose votes are summed; 0 = none.
      probes: i32[B, N], queries of the chunk whose mass is summed; negative or at `length` and beyond = none.
      key_norms: Whether to square and sum the channels of the keys at slots `start` to `start + length`.
      implementation, interpret: Of `mass` and `probe_mass`.
    """
    options = {
        "soft_cap": soft_cap, "sliding_window": sliding_window, "implementation": implementation, "interpret": interpret
    }  # fmt: skip
    votes = probed = None
    if last_window:
        window = min(last_window, q.shape[3])
        first = jnp.maximum(length - window, 0)
        cut = jax.vmap(lambda x, at: lax.dynamic_slice_in_dim(x, at, window, 2))
        votes = mass(cut(q, first), k, cut(lse, first), start + first, jnp.minimum(length, window), **options)
    if probes is not None:
        at = jnp.where((probes >= 0) & (probes < length[:, None]), start[:, None] + probes, -1)
        take = jax.vmap(lambda x, rows: jnp.take(x, rows, axis=2, mode="clip"))
        probed = probe_mass(take(q, probes), k, take(lse, probes), at, **options)
    return Statistics(votes, probed, _squares(k, start, length) if key_norms else None)


def _squares(k: jax.Array, start: jax.Array, length: jax.Array) -> jax.Array:
    slot = jnp.arange(k.shape[2])[None]
    fresh = (slot >= start[:, None]) & (slot < (start + length)[:, None])
    return jnp.where(fresh[:, None, :, None], jnp.square(k.astype(jnp.float32)), 0.0).sum(2)
