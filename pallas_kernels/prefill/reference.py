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


def mass(q, k, lse, start, length, *, soft_cap=None, sliding_window=None):
    """See `api.mass`."""
    t = jnp.arange(q.shape[3])
    logits = capped(jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32), soft_cap)
    live = visible(start, t, jnp.arange(k.shape[2]), sliding_window)
    live = live & (t[None] < length[:, None])[:, None, None, :, None]
    return jnp.where(live, jnp.exp(logits - lse[..., None]), 0.0).sum((2, 3))


def capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    """Squash logits into (-soft_cap, soft_cap); None leaves them."""
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def visible(start: jax.Array, t: jax.Array, s: jax.Array, sliding_window: int | None) -> jax.Array:
    """Which slots s [S] a query t [T] of each row sees: bool[B, 1, 1, T, S]."""
    ago = (start[:, None] + t[None])[:, None, None, :, None] - s[None, None, None, None, :]
    return (ago >= 0) if sliding_window is None else (ago >= 0) & (ago < sliding_window)
