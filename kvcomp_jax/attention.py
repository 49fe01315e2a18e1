"""Partial softmax states, and how they merge.

Attention over disjoint sets of tokens is a commutative monoid: an exact window, a compressed body, sinks, the
shards of other devices each give a state, and `merge` joins them. Source: FlashAttention's online softmax,
Milakov and Gimelshein 2018, arXiv:1805.02867; its use for splits, Dao et al. 2023 (Flash-Decoding).
"""

import functools
from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.types import pytree
from pallas_kernels import prefill as prefill_op
from pallas_kernels.prefill import MASK_VALUE


@pytree
class AttnState:
    """Unnormalised attention of some queries over some tokens."""

    acc: jax.Array  # f32[*b, R, D], sum over tokens of exp(logit - max) * v
    max: jax.Array  # f32[*b, R], largest logit, MASK_VALUE when no token was live
    sum: jax.Array  # f32[*b, R], sum over tokens of exp(logit - max)


def unit(shape: tuple[int, ...]) -> AttnState:
    """Return the state over no tokens for queries of `shape` (*b, R, D); it changes nothing in a merge."""
    return AttnState(acc=jnp.zeros(shape), max=jnp.full(shape[:-1], MASK_VALUE), sum=jnp.zeros(shape[:-1]))


def merge(a: AttnState, b: AttnState) -> AttnState:
    """Join the states of the same queries over two disjoint sets of tokens."""
    top = jnp.maximum(a.max, b.max)
    keep_a, keep_b = jnp.exp(a.max - top), jnp.exp(b.max - top)
    acc = a.acc * keep_a[..., None] + b.acc * keep_b[..., None]
    return AttnState(acc=acc, max=top, sum=a.sum * keep_a + b.sum * keep_b)


def merge_all(states: list[AttnState]) -> AttnState:
    """Join one or more states."""
    return reduce(merge, states)


def psum_merge(state: AttnState, axis_name: str) -> AttnState:
    """Join the states that the devices of a mesh axis hold; every device gets the result.

    Moves (D + 2) floats a query and device: one `pmax` and two `psum`.
    """
    top = lax.pmax(state.max, axis_name)
    keep = jnp.exp(state.max - top)
    acc, total = lax.psum((state.acc * keep[..., None], state.sum * keep), axis_name)
    return AttnState(acc=acc, max=top, sum=total)


def finalize(state: AttnState) -> jax.Array:
    """Divide by the softmax sum: f32[*b, R, D]; queries that saw no token give zeros."""
    total = state.sum[..., None]
    return jnp.where(total > 0, state.acc / jnp.where(total > 0, total, 1.0), 0.0)


def lse(state: AttnState) -> jax.Array:
    """Return the log of the softmax denominator, f32[*b, R]; MASK_VALUE where no token was live."""
    return jnp.where(state.sum > 0, state.max + jnp.log(jnp.where(state.sum > 0, state.sum, 1.0)), MASK_VALUE)


def from_logits(
    logits: jax.Array, live: jax.Array, mix: Callable[[jax.Array], jax.Array]
) -> tuple[AttnState, jax.Array]:
    """Make a state from logits f32[*b, R, S], a broadcastable mask and `mix(p) -> p @ V`.

    Also returns the logits with MASK_VALUE at dead slots, for whoever needs probabilities.
    """
    logits = jnp.where(live, logits, MASK_VALUE)
    top = logits.max(-1)
    p = jnp.where(live, jnp.exp(logits - top[..., None]), 0.0)
    return AttnState(acc=mix(p), max=top, sum=p.sum(-1)), logits


def group_queries(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """Bring q [B, T, H, D] to [B, K, G, T, D]."""
    batch, num_queries, num_heads, head_dim = q.shape
    q = q.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return q.transpose(0, 2, 3, 1, 4)


def ungroup_queries(out: jax.Array) -> jax.Array:
    """Bring [B, K, G, T, D] back to [B, T, H, D]."""
    batch, num_kv_heads, groups, num_queries, head_dim = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, num_queries, num_kv_heads * groups, head_dim)


def scaled(q: jax.Array, sm_scale: float | None) -> jax.Array:
    """Multiply q by the softmax scale, by default head_dim ** -0.5, in float32."""
    return q.astype(jnp.float32) * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> jax.Array:
    """Attend causally within one sequence a row, without a cache. Gradients compute the logits anew.

    Args:
      q: [B, T, H, D]. k, v: [B, T, K, D], H a multiple of K.
      sm_scale: Softmax scale; None is head_dim ** -0.5.
      soft_cap: See `pallas_kernels.prefill`.
      sliding_window: Tokens a query sees, itself included.

    Returns:
      [B, T, H, D] in q's dtype. Right padding needs no mask: it never precedes a real token.
    """
    check_qkv(q, k, v)
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    acc, top, total = jax.checkpoint(functools.partial(prefill_op.prefill, **options))(
        group_queries(scaled(q, sm_scale), k.shape[2]),
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        jnp.zeros(q.shape[0], jnp.int32),
    )
    return ungroup_queries(finalize(AttnState(acc=acc, max=top, sum=total))).astype(q.dtype)


def check_qkv(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raise ValueError unless q is [B, T, H, D], k and v are [B, T, K, D] and K divides H."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"attention needs q [B, T, H, D] and k, v [B, T, K, D]; got {q.shape}, {k.shape} and {v.shape}."
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} must have equal B, T and D.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"num_heads={q.shape[2]} must be a multiple of num_kv_heads={k.shape[2]}.")
