"""Filling a cache: attention inside the prompt, in one pass or in chunks, then compression in one go."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.attention import AttnState, group_queries, lse, scaled
from kvcomp_jax.cache import Exact, LayerCache, check_fits, next_positions, settle
from kvcomp_jax.fill import fill, overlay
from kvcomp_jax.policies import Policy, Probes, Prompt, Watched
from kvcomp_jax.read import attend_held, decode, make_queries, output
from kvcomp_jax.spec import LayerSpec
from kvcomp_jax.streamed import attend_streamed
from kvcomp_jax.types import pytree, static
from pallas_kernels import prefill as prefill_op
from pallas_kernels.prefill.reference import stands_at


@pytree
class PromptCache:
    """A cache and beside it the exact tokens of a prompt that is still being read.

    Chunks attend to each other exactly, or as a stream would (`LayerSpec.prefill`), so that chunking changes nothing,
    and to what `base` already held.
    """

    base: LayerCache | None  # None: see `detach`
    staged: Exact | None  # None: the prompt comes in one pass and needs no staging
    watched: Watched | None  # what the policy keeps of the queries until the prompt closes
    filled: jax.Array  # i32[B], tokens staged
    pos: jax.Array | None = None  # i32[B, S], text positions of a prompt of which some were left out; None: in order
    output_norm: jax.Array | None = None  # f32[B, K, S], of staged values, if `weighs_outputs`
    policy: Policy | None = static()  # of base if it looks at prompts
    streamed: LayerSpec | None = static(default=None)  # as whose stream chunks attend; None: exactly
    sliding_window: int | None = static()
    soft_cap: float | None = static(default=None)  # that the queries watched saw
    fresh: bool = static()  # base is empty
    final: bool = static()  # the next chunk is the last; it closes the prompt

    @property
    def in_one_chunk(self) -> bool:
        """Whether it is empty, and the whole prompt comes in one chunk that leaves it open."""
        return self.staged is None and not self.final

    @property
    def weighs_outputs(self) -> bool:
        """Whether its policy must know `output_norm` of each chunk."""
        return self.fresh and self.policy is not None and self.policy.weighs_outputs


def open_prompt(
    cache: LayerCache, capacity: int, *, fresh: bool = True, final: bool = False, num_heads: int | None = None
) -> PromptCache:
    """Start a prompt of up to `capacity` tokens a row, padding of its chunks included.

    Args:
      cache: An empty cache, or with `fresh=False` one that holds the conversation so far.
      capacity: Tokens to stage. 0 stages nothing: the whole prompt must then come in one chunk, which leaves its tokens
        staged until `close_prompt` unless it is `final`.
      fresh: Whether `cache` is empty.
      final: Whether the next chunk is the last one; `attend` then returns the closed cache.
      num_heads: Query heads of the model; needed where the cache's policy judges a staged prompt by its queries.

    Raises:
      ValueError: If `capacity` is negative, or `num_heads` is missing or no multiple of the cache's KV heads.
    """
    if capacity < 0:
        raise ValueError(f"capacity={capacity} must be positive, or 0 for a prompt in one chunk.")
    batch, heads, _, head_dim = cache.window.k.shape
    policy, staged, watched, norm = cache.spec.policy, None, None, None
    if capacity:
        slots, dtype = (batch, heads, capacity), cache.window.k.dtype
        stat = policy.new_stat(slots) if policy.keeps_stat else None
        staged = Exact(k=jnp.zeros((*slots, head_dim), dtype), v=jnp.zeros((*slots, head_dim), dtype), stat=stat)
        if policy.watches:
            if num_heads is None or num_heads % heads:
                raise ValueError(
                    f"num_heads={num_heads} must be the model's query heads, a multiple of {heads}: "
                    f"{type(policy).__name__} judges a prompt by its queries."
                )
            watched = policy.new_watched((batch, heads, num_heads // heads), head_dim, capacity)
        norm = jnp.zeros(slots) if fresh and policy.weighs_outputs else None
    return PromptCache(
        base=cache,
        staged=staged,
        watched=watched,
        output_norm=norm,
        filled=jnp.zeros_like(cache.length),
        policy=policy if policy.looks_at_prompt else None,
        streamed=cache.spec if fresh and cache.spec.prefill == "stored" else None,
        sliding_window=cache.spec.sliding_window,
        fresh=fresh,
        final=final,
    )


def detach(prompt: PromptCache) -> tuple[LayerCache, PromptCache]:
    """Take the cache out of a fresh, staged prompt, which needs it again only when it closes.

    What remains reads its chunks with one program for all methods that read them exactly and whose policies do not look
    at them.

    Raises:
      ValueError: If the prompt continues a conversation, is not staged, or closes by itself.
    """
    if prompt.base is None or not prompt.fresh or prompt.staged is None or prompt.final:
        raise ValueError("detach needs a fresh prompt that stages chunks, still attached to its cache and not final.")
    return prompt.base, dataclasses.replace(prompt, base=None)


def close_prompt(prompt: PromptCache, base: LayerCache | None = None, *, stat: jax.Array | None = None) -> LayerCache:
    """Rank and compress the staged tokens and return the cache that holds them.

    Args:
      prompt: See `open_prompt`.
      base: The cache that `detach` took out of it, if it did.
      stat: f32[B, K, S] by which the policy shall rank the staged tokens, instead of what it makes of the prompt.

    Raises:
      ValueError: If there is no cache, or two.
    """
    if (prompt.base is None) == (base is None):
        raise ValueError("close_prompt needs the prompt's cache once: attached, or detached as `base`.")
    cache = cast(LayerCache, prompt.base if base is None else base)
    if prompt.staged is None:
        return cache
    return _close(prompt, cache, prompt.staged, stat)


def _close(prompt: PromptCache, cache: LayerCache, staged: Exact, stat: jax.Array | None = None) -> LayerCache:
    if stat is not None:
        staged = dataclasses.replace(staged, stat=stat)
    elif prompt.policy is not None and (prompt.fresh or prompt.policy.keeps_stat):  # else ranks would be forgotten
        seen = as_seen(prompt, cache, staged)
        staged = dataclasses.replace(staged, stat=prompt.policy.from_prompt(staged.stat, seen))
    if not prompt.fresh:
        return absorb(cache, staged, prompt.filled)
    query = prompt.watched.q[:, :, :, 0] if isinstance(prompt.watched, Probes) else None
    return fill(cache, staged, prompt.filled, prompt.pos, query)


def as_seen(prompt: PromptCache, cache: LayerCache | None, staged: Exact) -> Prompt:
    """A prompt as its policy sees it."""
    return Prompt(
        k=staged.k,
        v=staged.v,
        length=prompt.filled,
        watched=prompt.watched,
        start=jnp.zeros_like(prompt.filled) if prompt.fresh or cache is None else cache.length,
        soft_cap=prompt.soft_cap,
        sliding_window=prompt.sliding_window,
        output_norm=prompt.output_norm,
    )


def peak_attention(prompt: PromptCache, since: jax.Array) -> jax.Array:
    """The greatest attention that each staged token received from tokens after the first `since` i32[B]: f32[B, K, S].

    Of the heads of a group the greatest counts. The prompt's policy must keep these tokens' queries as probes.
    """
    seen = as_seen(prompt, None, cast(Exact, prompt.staged))
    probes = seen.kept
    later = dataclasses.replace(probes, at=jnp.where(probes.at >= since[:, None], probes.at, -1))
    return dataclasses.replace(seen, watched=later).peak()


def prefill(
    cache: LayerCache,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array | None = None,
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
    output_norm: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Read a whole prompt into an empty cache: attend causally, exactly unless its spec says otherwise, then compress.

    Args:
      q: [B, T, H, D]; k, v: [B, T, K, D], right padded, keys already at their positions.
      length: i32[B], real tokens of each row; None = T.
      sm_scale, soft_cap: As in `decode`.
      output_norm: As in `extend`.

    Returns:
      out [B, T, H, D] in q's dtype, and the cache.
    """
    prompt = open_prompt(cache, 0, final=True)
    out, closed = extend(prompt, q, k, v, length, sm_scale=sm_scale, soft_cap=soft_cap, output_norm=output_norm)
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
    output_norm: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache | PromptCache]:
    """Attend from new tokens to a cache and to themselves, and keep them: the one call a model makes.

    A `PromptCache` takes a chunk of the prompt, see `extend`, which alone needs `output_norm`, and only if
    `wants_output_norm(cache)`; a `LayerCache` takes a decode step, see `decode`.
    """
    options = {"sm_scale": sm_scale, "soft_cap": soft_cap}
    if isinstance(cache, PromptCache):
        return extend(cache, q, k, v, length, **options, output_norm=output_norm)
    return decode(cache, q, k, v, length, **options)


def extend(
    prompt: PromptCache,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array | None = None,
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
    output_norm: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache | PromptCache]:
    """Read one chunk of a prompt.

    Args:
      prompt: See `open_prompt`; the padded chunks together must fit its capacity.
      q: [B, T, H, D]; k, v: [B, T, K, D], right padded. length: i32[B], real tokens a row; None = T.
      sm_scale, soft_cap: As in `decode`.
      output_norm: f32[B, T, K] of the chunk, see `outputs.output_norm`; for policies that weigh outputs, else unused.

    Returns:
      out [B, T, H, D] and the prompt; the closed cache if it was `final`.

    Raises:
      ValueError: If shapes do not fit, or the policy weighs outputs and `output_norm` is missing.
    """
    base = prompt.base
    check_fits(cast(Exact, prompt.staged or cast(LayerCache, base).window), q, k, v)
    length = jnp.full(q.shape[0], q.shape[1], jnp.int32) if length is None else length
    staged = _stage(prompt, k, v)
    grouped = group_queries(scaled(q, sm_scale), k.shape[2])
    options = {"soft_cap": soft_cap, "sliding_window": prompt.sliding_window}
    state, received = _attend_prompt(prompt, grouped, staged, length, options)
    if not prompt.fresh and base is not None:
        queries = make_queries(_seen(base, prompt.filled), q, length, sm_scale, soft_cap)
        state, base = attend_held(base, queries, frozen=True, beside=state)
    chunk = Probes(
        q=grouped, lse=lse(state).reshape(grouped.shape[:4]), at=stands_at(prompt.filled, length, q.shape[1])
    )
    watched = _watch(prompt, chunk)
    if prompt.policy is not None and _wants_mass(prompt):
        if received is None:
            received = prefill_op.mass(grouped, staged.k, chunk.lse, prompt.filled, length, **options)
        before = jnp.zeros_like(length) if prompt.fresh or base is None else base.length
        pos = next_positions(before, staged.k.shape[2])[:, None]
        seen = before + prompt.filled + length
        staged = dataclasses.replace(staged, stat=prompt.policy.observe(staged.stat, received, pos, seen, length))
    read = dataclasses.replace(prompt, base=base, watched=watched, filled=prompt.filled + length)
    if prompt.weighs_outputs:
        read = dataclasses.replace(read, output_norm=_stage_norm(prompt, output_norm, k))
    if watched is not None:
        read = dataclasses.replace(read, soft_cap=soft_cap)
    if prompt.final:
        return output(state, q), _close(read, cast(LayerCache, base), staged)
    return output(state, q), dataclasses.replace(read, staged=staged)


def _attend_prompt(
    prompt: PromptCache, q: jax.Array, staged: Exact, length: jax.Array, options: dict[str, Any]
) -> tuple[AttnState, jax.Array | None]:
    """Attend from a chunk q [B, K, G, T, D] to the staged tokens; also the mass that they got, if in the same pass."""
    if prompt.streamed is not None:
        return attend_streamed(prompt.streamed, q, staged, prompt.filled, soft_cap=options["soft_cap"]), None
    received = None
    if prompt.fresh and _wants_mass(prompt):  # else what the cache holds already counts in the denominators
        state, received = prefill_op.prefill_with_mass(q, staged.k, staged.v, prompt.filled, length, **options)
    else:
        state = prefill_op.prefill(q, staged.k, staged.v, prompt.filled, **options)
    acc, top, total = state
    rows = (*q.shape[:2], -1)
    return AttnState(acc=acc.reshape(*rows, q.shape[-1]), max=top.reshape(rows), sum=total.reshape(rows)), received


def _wants_mass(prompt: PromptCache) -> bool:
    """Whether the policy is told what attention each staged token got from every chunk."""
    policy = prompt.policy
    return policy is not None and policy.needs_probs and not policy.watches


def positions(cache: LayerCache | PromptCache, num_tokens: int) -> jax.Array:
    """Text positions of the next `num_tokens` tokens of every row, i32[B, T]."""
    if not isinstance(cache, PromptCache):
        return next_positions(cache.length, num_tokens)
    return next_positions(cache.filled if cache.base is None else cache.base.length + cache.filled, num_tokens)


def _watch(prompt: PromptCache, chunk: Probes) -> Watched | None:
    """What the policy keeps of the queries so far and the chunk's."""
    if prompt.policy is None or not prompt.policy.watches:
        return None
    capacity = chunk.at.shape[1] if prompt.staged is None else prompt.staged.k.shape[2]
    return prompt.policy.watch(prompt.watched, chunk, capacity)


def _stage(prompt: PromptCache, k: jax.Array, v: jax.Array) -> Exact:
    """Write a chunk k, v [B, T, K, D] behind what each row has staged; without staging it is the whole prompt."""
    dtype = cast(Exact, prompt.staged or cast(LayerCache, prompt.base).window).k.dtype
    k, v = k.swapaxes(1, 2).astype(dtype), v.swapaxes(1, 2).astype(dtype)
    if prompt.staged is None:
        policy = prompt.policy
        return Exact(k=k, v=v, stat=policy.new_stat(k.shape[:3]) if policy and policy.keeps_stat else None)
    if k.shape[2] > prompt.staged.k.shape[2]:
        raise ValueError(f"a chunk of T={k.shape[2]} tokens exceeds the prompt's capacity={prompt.staged.k.shape[2]}.")
    write = jax.vmap(lambda x, new, at: lax.dynamic_update_slice_in_dim(x, new, at, 1))
    return dataclasses.replace(
        prompt.staged, k=write(prompt.staged.k, k, prompt.filled), v=write(prompt.staged.v, v, prompt.filled)
    )


def _stage_norm(prompt: PromptCache, norm: jax.Array | None, k: jax.Array) -> jax.Array:
    """Write a chunk's norms [B, T, K] behind those so far, as `_stage` does its keys [B, T, K, D]."""
    if norm is None or norm.shape != k.shape[:3]:
        raise ValueError(
            f"output_norm={None if norm is None else norm.shape} must be {k.shape[:3]}: {type(prompt.policy).__name__} "
            "weighs values by what the output projection makes of them. Pass kvcomp_jax.output_norm(v, weight), or "
            "take projected=False, by which they count as cached."
        )
    norm = norm.swapaxes(1, 2).astype(jnp.float32)
    if prompt.output_norm is None:
        return norm
    write = jax.vmap(lambda x, new, at: lax.dynamic_update_slice_in_dim(x, new, at, 1))
    return write(prompt.output_norm, norm, prompt.filled)


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
