"""Unnormalised attention (acc, max, sum) of some queries over some slots: what blocks, splits and tiers merge by.

Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

MASK_VALUE = -1e30  # finite, so that a query without live slots gives sum 0 instead of NaN

State = tuple[jax.Array, jax.Array, jax.Array]  # acc f32[*b, R, D], max f32[*b, R], sum f32[*b, R]


def unit(shape: tuple[int, ...]) -> State:
    """Return the state over no slots for an accumulator of `shape` (*b, R, D); it changes nothing in a merge."""
    return jnp.zeros(shape), jnp.full(shape[:-1], MASK_VALUE), jnp.zeros(shape[:-1])


def merge(a: State, b: State) -> State:
    """Join the states of the same queries over two disjoint sets of slots."""
    top = jnp.maximum(a[1], b[1])
    keep_a, keep_b = jnp.exp(a[1] - top), jnp.exp(b[1] - top)
    return a[0] * keep_a[..., None] + b[0] * keep_b[..., None], top, a[2] * keep_a + b[2] * keep_b


def update(state: State, logits: jax.Array, live: jax.Array, mix: Callable[[jax.Array], jax.Array]) -> State:
    """Fold more slots into a state.

    Args:
      state: Of queries [*b, R] over the slots before.
      logits: f32[*b, R, P] of the new slots.
      live: Which of them each query sees, broadcastable to logits; the rest counts for nothing.
      mix: p f32[*b, R, P] -> p . V f32[*b, R, D]; p is relative to the new maximum, at most 1.
    """
    acc, top, total = state
    logits = jnp.where(live, logits, MASK_VALUE)
    new_top = jnp.maximum(top, logits.max(-1))
    keep = jnp.exp(top - new_top)
    p = jnp.where(live, jnp.exp(logits - new_top[..., None]), 0.0)
    return acc * keep[..., None] + mix(p), new_top, total * keep + p.sum(-1)
