"""Where the tokens of a prompt go: sinks, window and rungs, each gathered from the prompt in one piece."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.cache import Exact, LayerCache, thin
from kvcomp_jax.heads import assign, share, side_by_side
from kvcomp_jax.ladder import expand, left_by_drop
from kvcomp_jax.orders import permute
from kvcomp_jax.policies import PromptRank
from kvcomp_jax.tiers import Tier, arranged, ring_index


def fill(
    cache: LayerCache, prompt: Exact, length: jax.Array, pos: jax.Array | None = None, query: jax.Array | None = None
) -> LayerCache:
    """Distribute a prompt [B, K, S, D] of length i32[B] over an empty cache; `query` [B, K, G, D] is its last one.

    `pos` i32[B, S] says where its tokens stand in the text if some were left out before, none of the window's.

    The most recent `window` tokens stay exact. By age, the rest settles in whole blocks as it would have in a stream.
    Ranked, the best tokens fill the rungs from the top, each rung in order of position; if there are more than fit,
    the cache then holds exactly its budget.
    """
    policy = cache.spec.policy
    after_sinks = jnp.maximum(length - policy.num_sinks, 0)
    old = jnp.maximum(after_sinks - cache.window_limit, 0)
    settled = _whole_blocks(cache, old) if cache.spec.rungs else jnp.zeros_like(old)
    gone = _left_out(pos, length)
    settled = jnp.where(gone > 0, old, settled)  # the window is read by position, and takes none from before the gaps
    here = prompt
    if cache.spec.heads is not None:
        here = jax.tree.map(lambda x: x[:, jnp.array(cache.spec.heads)], prompt)
    cache = dataclasses.replace(cache, tiers=_fit(cache.tiers, here, length))
    if policy.fifo:
        tiers = _fill_by_age(cache, here, settled, query)
    else:
        tiers = _fill_by_score(cache, here, settled, length, pos)
    filled = dataclasses.replace(cache, tiers=tiers, settled=settled + gone)
    return thin(overlay(filled, prompt, -gone, length + gone))


def _left_out(pos: jax.Array | None, length: jax.Array) -> jax.Array:
    """How many tokens of the text are not among those that stand at pos i32[B, S], i32[B]."""
    if pos is None:
        return jnp.zeros_like(length)
    last = jnp.take_along_axis(pos, jnp.maximum(length - 1, 0)[:, None], 1)[:, 0]
    return jnp.where(length > 0, last + 1 - length, 0)


def _fit(tiers: tuple[Tier, ...], prompt: Exact, length: jax.Array) -> tuple[Tier, ...]:
    """Give the codecs the parameters that suit the whole prompt."""
    live = (jnp.arange(prompt.k.shape[2])[None] < length[:, None])[:, None]

    def fit(tier: Tier) -> Tier:
        k, v, real = prompt.k, prompt.v, live
        if tier.head is not None:
            k, v, real = (side_by_side(x) for x in (k, v, jnp.repeat(live, tier.pooled, 1)))
        return dataclasses.replace(tier, k_codec=tier.k_codec.fit(k, real), v_codec=tier.v_codec.fit(v, real))

    return tuple(fit(tier) for tier in tiers)


def overlay(cache: LayerCache, staged: Exact, first: jax.Array, count: jax.Array) -> LayerCache:
    """Append tokens first .. first + count (i32[B]) of staged [B, K, S, D] to sinks and window, however many."""
    num_sinks, num_slots = cache.spec.policy.num_sinks, cache.spec.window_slots
    length = cache.length + count
    index = ring_index(jnp.maximum(length - num_sinks, 0), num_slots, num_slots)
    window = _replace_new(cache.window, staged, index + num_sinks - cache.length[:, None], first, count)
    sinks = cache.sinks
    if sinks is not None:
        pos = jnp.arange(num_sinks, dtype=jnp.int32)[None]
        sinks = _replace_new(sinks, staged, pos - cache.length[:, None], first, count)
    return dataclasses.replace(cache, window=window, sinks=sinks, length=length)


def _replace_new(old: Exact, staged: Exact, offset: jax.Array, first: jax.Array, count: jax.Array) -> Exact:
    """Take token first + offset (i32[B, S]) of staged where 0 <= offset < count, and the old slot elsewhere."""
    new = ((offset >= 0) & (offset < count[:, None]))[:, None]
    rows = gather(staged, (offset + first[:, None])[:, None])
    k = jnp.where(new[..., None], rows.k, old.k)
    v = jnp.where(new[..., None], rows.v, old.v)
    if old.stat is None:
        return Exact(k=k, v=v, stat=None)
    return Exact(k=k, v=v, stat=jax.tree.map(lambda x, y: jnp.where(expand(new, x), x, y), rows.stat, old.stat))


def gather(rows: Exact, index: jax.Array) -> Exact:
    """Take tokens at index i32[B, K or 1, n] of rows [B, K, S, D]; out of range is clipped."""

    def one(x: jax.Array) -> jax.Array:
        where = index if x.ndim == 3 else index[..., None]
        return jnp.take_along_axis(x, where, 2, mode="clip")

    return jax.tree.map(one, rows)


def _whole_blocks(cache: LayerCache, old: jax.Array) -> jax.Array:
    """Of `old` tokens that left the exact window, how many settle; the rest waits in the window for its block."""
    whole = old - old % cache.spec.prompt_step
    if cache.spec.policy.fifo or cache.spec.divided:
        return whole
    room = sum(_room(cache))
    return jnp.where(old > room, old, whole)


def _room(cache: LayerCache) -> list[jax.Array]:
    """Slots that a prompt may take on each rung, i32[B]."""
    return [tier.limit // tier.pooled - rung.reserve for tier, rung in zip(cache.tiers, cache.spec.rungs, strict=True)]


def _fill_by_age(cache: LayerCache, prompt: Exact, settled: jax.Array, query: jax.Array | None) -> tuple[Tier, ...]:
    """Rings of consecutive blocks: the newest on the first rung; query f32[B, K, G, D] is the prompt's last."""
    tiers, entered = [], settled
    for tier in cache.tiers:
        index = ring_index(entered, tier.limit, tier.capacity) + cache.spec.policy.num_sinks
        index = jnp.broadcast_to(index[:, None], (*prompt.k.shape[:2], tier.capacity))
        rows = gather(prompt, index)
        k, v, index = arranged(tier, rows.k, rows.v, index)
        lookup = tier.lookup
        if lookup is not None:
            lookup, order = lookup.from_prompt(k, jnp.minimum(entered, tier.limit), query)
            if order is not None:
                k, v, index = (permute(x, order) for x in (k, v, index))
        k, v = tier.k_codec.encode(k, index), tier.v_codec.encode(v, index)
        if lookup is not None:
            (k, v), lookup = lookup.offload((k, v), prompt.k.shape[1], tier.capacity // lookup.lookup.index.page_size)
        count = jnp.where(tier.limit > 0, entered, 0)
        tiers.append(dataclasses.replace(tier, k=k, v=v, entered=count, lookup=lookup))
        entered = jnp.maximum(entered - tier.limit, 0)
    return tuple(tiers)


def _fill_by_score(
    cache: LayerCache, prompt: Exact, settled: jax.Array, length: jax.Array, text: jax.Array | None
) -> tuple[Tier, ...]:
    """The highest scores first, lower index first among equals: as many as a rung has room for, or its share."""
    policy, num_slots = cache.spec.policy, prompt.k.shape[2]
    place = jnp.arange(num_slots, dtype=jnp.int32)[None]
    candidate = (place >= policy.num_sinks) & (place < (settled + policy.num_sinks)[:, None])
    pos = jnp.broadcast_to(jnp.where(place < length[:, None], place, -1)[:, None], prompt.k.shape[:3])
    score = jnp.where(candidate[:, None], policy.judge(prompt.stat, prompt.k, pos), -jnp.inf)
    if cache.tiers[0].head is not None:
        return (_fill_shared(cache, prompt, score, settled),)
    num_best = num_slots if cache.spec.divided else sum(tier.capacity for tier in cache.tiers)
    order = lax.top_k(score, min(num_slots, num_best))[1].astype(jnp.int32)
    tiers, first = [], jnp.zeros_like(settled)
    for tier, room in zip(cache.tiers, _room(cache), strict=True):
        here = room if tier.keeps is None else settled // cache.spec.block_size * tier.keeps
        count = jnp.clip(settled - first, 0, jnp.minimum(here, room)) // tier.unit * tier.unit
        taken = left_by_drop(tier, count, cache.spec.drop) if tier is cache.tiers[-1] else count
        slot = jnp.arange(tier.capacity, dtype=jnp.int32)[None]
        rank = slot + first[:, None]
        live = slot < taken[:, None]
        index = jnp.take_along_axis(order, rank[:, None], 2, mode="clip")
        index = jnp.sort(jnp.where(live[:, None], index, num_slots), -1)
        rows = gather(prompt, index)
        k, v, (index, stat) = arranged(tier, rows.k, rows.v, (index, rows.stat))
        kept = jnp.where(index < num_slots, index, -1)
        if text is not None:
            kept = jnp.where(kept >= 0, jnp.take_along_axis(text[:, None], index, -1, mode="clip"), -1)
        k, v = tier.k_codec.encode(k, kept), tier.v_codec.encode(v, kept)
        masked = jax.tree.map(lambda x, live=kept >= 0: jnp.where(expand(live, x), x, 0), stat)
        what = {"pos": None if tier.pos is None else kept, "stat": None if tier.stat is None else masked}
        tiers.append(dataclasses.replace(tier, k=k, v=v, entered=count, **what))
        first = first + here
    return tuple(tiers)


def _fill_shared(cache: LayerCache, prompt: Exact, score: jax.Array, settled: jax.Array) -> Tier:
    """Fill the slots that heads share: the highest scores of all, and each head's in order of position."""
    tier, num_tokens = cache.tiers[0], prompt.k.shape[2]
    policy = cast(PromptRank, cache.spec.policy)
    mean = jnp.minimum(settled, _room(cache)[0]) // tier.unit * tier.unit
    counts = share(score, mean, tier.unit, cast(float, policy.least_share))
    rank = jnp.argsort(lax.top_k(score, num_tokens)[1], -1)
    place = jnp.arange(num_tokens, dtype=jnp.int32)[None, None]
    kept = jnp.sort(jnp.where(rank < counts[..., None], place, num_tokens), -1)  # [B, K, S]
    head, which, live = assign(counts, tier.capacity)
    here = jnp.clip(which, 0, num_tokens - 1) + head * num_tokens
    at = jnp.take_along_axis(side_by_side(kept), here[:, None], -1)  # [B, 1, slots]
    rows = gather(jax.tree.map(side_by_side, prompt), at + (head * num_tokens)[:, None])
    pos = jnp.where(live[:, None], at, -1)
    k, v, pos = arranged(tier, rows.k, rows.v, pos)
    k, v = tier.k_codec.encode(k, pos), tier.v_codec.encode(v, pos)
    owner = head[:, None].astype(jnp.uint8)
    return dataclasses.replace(tier, k=k, v=v, pos=pos, head=owner, entered=live.sum(-1, dtype=jnp.int32))
