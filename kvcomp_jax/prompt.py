"""Filling a cache: exact attention inside the prompt, in one pass or in chunks, then compression in one go."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.attention import AttnState, group_queries, lse, scaled
from kvcomp_jax.cache import Exact, LayerCache, check_fits, next_positions, settle
from kvcomp_jax.fill import fill, overlay
from kvcomp_jax.read import attend_held, decode, make_queries, output
from kvcomp_jax.types import pytree, static
from pallas_kernels import prefill as prefill_op


@pytree
class PromptCache:
    """A cache and beside it the exact tokens of a prompt that is still being read.

    Chunks attend exactly to each other, so that chunking changes nothing, and to what `base` already held.
    """

    base: LayerCache
    staged: Exact | None  # None: the prompt comes in one pass and needs no staging
    filled: jax.Array  # i32[B], tokens staged
    fresh: bool = static()  # base is empty
    final: bool = static()  # the next chunk is the last; it closes the prompt


def open_prompt(cache: LayerCache, capacity: int, *, fresh: bool = True, final: bool = False) -> PromptCache:
    """Start a prompt of up to `capacity` tokens a row, padding of its chunks included.

    Args:
      cache: An empty cache, or with `fresh=False` one that holds the conversation so far.
      capacity: Tokens to stage. 0 stages nothing: the whole prompt must then come in one chunk.
      fresh: Whether `cache` is empty.
      final: Whether the next chunk is the last one; `attend` then returns the closed cache.

    Raises:
      ValueError: If `capacity` is negative, or 0 although more than one chunk may come.
    """
    if capacity < 0 or (capacity == 0 and not final):
        raise ValueError(f"capacity={capacity} must be positive, or 0 with final=True for a prompt in one chunk.")
    staged = None
    if capacity:
        batch, heads, _, head_dim = cache.window.k.shape
        slots, dtype = (batch, heads, capacity), cache.window.k.dtype
        stat = jnp.zeros(slots) if cache.spec.policy.needs_probs else None
        staged = Exact(k=jnp.zeros((*slots, head_dim), dtype), v=jnp.zeros((*slots, head_dim), dtype), stat=stat)
    return PromptCache(base=cache, staged=staged, filled=jnp.zeros_like(cache.length), fresh=fresh, final=final)


def close_prompt(prompt: PromptCache) -> LayerCache:
    """Rank and compress the staged tokens and return the cache that holds them."""
    if prompt.staged is None:
        return prompt.base
    return (fill if prompt.fresh else absorb)(prompt.base, prompt.staged, prompt.filled)


def prefill(
    cache: LayerCache,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array | None = None,
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Read a whole prompt into an empty cache: attend exactly and causally, then compress.

    Args:
      q: [B, T, H, D]; k, v: [B, T, K, D], right padded, keys already at their positions.
      length: i32[B], real tokens of each row; None = T.
      sm_scale, soft_cap: As in `decode`.

    Returns:
      out [B, T, H, D] in q's dtype, and the cache.
    """
    prompt = open_prompt(cache, 0, final=True)
    out, closed = extend(prompt, q, k, v, length, sm_scale=sm_scale, soft_cap=soft_cap)
    return out, cast(LayerCache, closed)


def attend(
    cache: LayerCache | PromptCache,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array | None = None,
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[jax.Array, LayerCache | PromptCache]:
    """Attend from new tokens to a cache and to themselves, and keep them: the one call a model makes.

    A `PromptCache` takes a chunk of the prompt, see `extend`; a `LayerCache` takes a decode step, see `decode`.
    """
    step = extend if isinstance(cache, PromptCache) else decode
    return step(cache, q, k, v, length, sm_scale=sm_scale, soft_cap=soft_cap)


def extend(
    prompt: PromptCache,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array | None = None,
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[jax.Array, LayerCache | PromptCache]:
    """Read one chunk of a prompt.

    Args:
      prompt: See `open_prompt`; the padded chunks together must fit its capacity.
      q: [B, T, H, D]; k, v: [B, T, K, D], right padded. length: i32[B], real tokens a row; None = T.

    Returns:
      out [B, T, H, D], exact over the prompt, and the prompt; the closed cache if it was `final`.
    """
    check_fits(prompt.base, q, k, v)
    length = jnp.full(q.shape[0], q.shape[1], jnp.int32) if length is None else length
    staged = _stage(prompt, k, v)
    window, policy = prompt.base.spec.sliding_window, prompt.base.spec.policy
    grouped = group_queries(scaled(q, sm_scale), k.shape[2])
    acc, top, total = prefill_op.prefill(
        grouped, staged.k, staged.v, prompt.filled, soft_cap=soft_cap, sliding_window=window
    )
    rows = (*grouped.shape[:2], -1)
    state = AttnState(acc=acc.reshape(*rows, q.shape[-1]), max=top.reshape(rows), sum=total.reshape(rows))
    base = prompt.base
    if not prompt.fresh:
        queries = make_queries(_seen(base, prompt.filled), q, length, sm_scale, soft_cap)
        state, base = attend_held(base, queries, frozen=True, beside=state)
    if policy.needs_probs:
        received = prefill_op.mass(
            grouped,
            staged.k,
            lse(state).reshape(grouped.shape[:4]),
            prompt.filled,
            length,
            soft_cap=soft_cap,
            sliding_window=window,
        )
        pos = (prompt.base.length[:, None] + jnp.arange(staged.k.shape[2])[None])[:, None]
        staged = dataclasses.replace(staged, stat=policy.observe(staged.stat, received, pos))
    prompt = dataclasses.replace(prompt, base=base, staged=staged, filled=prompt.filled + length)
    return output(state, q), close_prompt(prompt) if prompt.final else prompt


def positions(cache: LayerCache | PromptCache, num_tokens: int) -> jax.Array:
    """Text positions of the next `num_tokens` tokens of every row, i32[B, T]."""
    seen = cache.base.length + cache.filled if isinstance(cache, PromptCache) else cache.length
    return next_positions(seen, num_tokens)


def _stage(prompt: PromptCache, k: jax.Array, v: jax.Array) -> Exact:
    """Write a chunk k, v [B, T, K, D] behind what each row has staged; without staging it is the whole prompt."""
    dtype = prompt.base.window.k.dtype
    k, v = k.swapaxes(1, 2).astype(dtype), v.swapaxes(1, 2).astype(dtype)
    if prompt.staged is None:
        stat = jnp.zeros(k.shape[:3]) if prompt.base.spec.policy.needs_probs else None
        return Exact(k=k, v=v, stat=stat)
    if k.shape[2] > prompt.staged.k.shape[2]:
        raise ValueError(f"a chunk of T={k.shape[2]} tokens exceeds the prompt's capacity={prompt.staged.k.shape[2]}.")
    write = jax.vmap(lambda x, new, at: lax.dynamic_update_slice_in_dim(x, new, at, 1))
    return dataclasses.replace(
        prompt.staged, k=write(prompt.staged.k, k, prompt.filled), v=write(prompt.staged.v, v, prompt.filled)
    )


def _seen(base: LayerCache, filled: jax.Array) -> LayerCache:
    """The base as if the staged tokens were in it, for positions only."""
    return dataclasses.replace(base, length=base.length + filled)


def absorb(cache: LayerCache, staged: Exact, count: jax.Array) -> LayerCache:
    """Append staged tokens [B, K, S, D], count i32[B] of them real, to a cache that already holds some."""
    size = cache.spec.block_size
    if not cache.spec.rungs:
        return overlay(cache, staged, jnp.zeros_like(count), count)

    def body(i: jax.Array, cache: LayerCache) -> LayerCache:
        taken = jnp.minimum(i * size, count)
        return settle(overlay(cache, staged, taken, jnp.minimum(count - taken, size)))

    return lax.fori_loop(0, (count.max() + size - 1) // size, body, settle(cache))
