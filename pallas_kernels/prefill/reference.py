"""The definition of the prefill operation: plain JAX with the whole T x S matrix."""

import jax
import jax.numpy as jnp

from pallas_kernels.softmax_state import MASK_VALUE


def prefill(q, k, v, start, *, soft_cap=None, sliding_window=None):
    """See `api.prefill`."""
    logits = capped(jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32), soft_cap)
    live = visible(start, jnp.arange(q.shape[3]), jnp.arange(k.shape[2]), sliding_window)
    logits = jnp.where(live, logits, MASK_VALUE)
    top = logits.max(-1)
    p = jnp.where(live, jnp.exp(logits - top[..., None]), 0.0)
    acc = jnp.einsum("bkgts,bksd->bkgtd", p, v.astype(jnp.float32))
    return acc, top, p.sum(-1)


def probe_mass(q, k, lse, at, *, soft_cap=None, sliding_window=None):
    """See `api.probe_mass`."""
    logits = capped(jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32), soft_cap)
    live = seen_from(at, jnp.arange(k.shape[2]), sliding_window)
    return jnp.where(live, jnp.exp(logits - lse[..., None]), 0.0).sum((2, 3))


def capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    """Squash logits into (-soft_cap, soft_cap); None leaves them."""
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def visible(start: jax.Array, t: jax.Array, s: jax.Array, sliding_window: int | None) -> jax.Array:
    """Which slots s [S] a query t [T] of each row sees: bool[B, 1, 1, T, S]."""
    return seen_from(start[:, None] + t[None], s, sliding_window)


def seen_from(at: jax.Array, s: jax.Array, sliding_window: int | None) -> jax.Array:
    """Which slots s [S] queries see that stand at slots `at` i32[B, T], -1 = none: bool[B, 1, 1, T, S]."""
    ago = at[:, None, None, :, None] - s[None, None, None, None, :]
    return (ago >= 0) if sliding_window is None else (ago >= 0) & (ago < sliding_window)


def stands_at(start: jax.Array, length: jax.Array, num_queries: int) -> jax.Array:
    """Slot of each query of a chunk, i32[B, T]; -1 from `length` on."""
    t = jnp.arange(num_queries)[None]
    return jnp.where(t < length[:, None], start[:, None] + t, -1)


def log_sum(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """Log of a state's softmax denominators; of those that saw nothing, zero."""
    _, top, total = state
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), 0.0)


def in_two_passes(prefill, probe_mass):
    """A backend's `prefill_with_mass`, made of its other two functions.

    Online softmax knows a query's denominator only after its last key, so where probabilities cannot be kept, mass
    takes a second look at the keys.
    """

    def prefill_with_mass(q, k, v, start, length, **options):
        """See `api.prefill_with_mass`."""
        state = prefill(q, k, v, start, **options)
        return state, probe_mass(q, k, log_sum(state), stands_at(start, length, q.shape[3]), **options)

    return prefill_with_mass


prefill_with_mass = in_two_passes(prefill, probe_mass)
