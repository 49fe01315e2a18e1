"""Reading a cache: attention over sinks, window and rungs, merged; one decode step."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcomp_jax.attention import (
    AttnState,
    finalize,
    from_logits,
    group_queries,
    lse,
    merge_all,
    scaled,
    ungroup_queries,
)
from kvcomp_jax.cache import Exact, LayerCache, append, check_fits, next_positions, sink_pos, window_pos
from kvcomp_jax.codecs import Identity
from kvcomp_jax.policies import Stat, Step
from kvcomp_jax.retrieval.read import attend_selected
from kvcomp_jax.tiers import Queries, Tier, attend_tier, logits_of, mix_of, tier_pos, visible
from pallas_kernels.prefill import MASK_VALUE


def decode(
    cache: LayerCache,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array | None = None,
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Append one or a few tokens to the window and attend to all that the cache holds.

    Call `settle` every `cache.spec.block_size` tokens: the window has room for that many.

    Args:
      q: [B, T, H, D]; k, v: [B, T, K, D], 1 <= T <= block_size, keys already at their positions.
      length: i32[B], real tokens of each row, the rest is padding; None = T. A row with 0 stays as it is.
      sm_scale: Softmax scale, by default head_dim ** -0.5. soft_cap: Cap on logits (Gemma 2).

    Returns:
      out [B, T, H, D] in q's dtype, and the cache, of unchanged structure.

    Raises:
      ValueError: If shapes disagree with the cache, or T exceeds `block_size`.
    """
    check_fits(cache.window, q, k, v)
    if q.shape[1] > cache.spec.block_size:
        raise ValueError(
            f"decode takes at most block_size={cache.spec.block_size} tokens a call, got T={q.shape[1]}; "
            "open_prompt(cache, capacity, fresh=False) takes longer chunks."
        )
    queries = make_queries(cache, q, length, sm_scale, soft_cap)
    state, cache = attend_held(append(cache, k, v, length), queries)
    return output(state, q), cache


def make_queries(
    cache: LayerCache, q: jax.Array, length: jax.Array | None, sm_scale: float | None, soft_cap: float | None
) -> Queries:
    """Scale and group q [B, T, H, D], whose tokens stand right after those that `cache` has seen."""
    num_kv_heads, num_tokens = cache.window.k.shape[1], q.shape[1]
    grouped = group_queries(scaled(q, sm_scale), num_kv_heads)
    groups = grouped.shape[2]
    real = None
    if length is not None:
        real = jnp.tile(jnp.arange(num_tokens)[None] < length[:, None], (1, groups))
    return Queries(
        q=grouped.reshape(*grouped.shape[:2], -1, q.shape[-1]),
        pos=jnp.tile(next_positions(cache.length, num_tokens), (1, groups)),
        real=real,
        soft_cap=soft_cap,
        sliding_window=cache.spec.sliding_window,
        groups=groups,
    )


def output(state: AttnState, q: jax.Array) -> jax.Array:
    """Normalise a state over grouped queries and bring it to the shape and dtype of q [B, T, H, D]."""
    batch, num_tokens, _, head_dim = q.shape
    out = finalize(state)
    out = out.reshape(batch, out.shape[1], -1, num_tokens, head_dim)
    return ungroup_queries(out).astype(q.dtype)


def attend_held(
    cache: LayerCache, queries: Queries, *, frozen: bool = False, beside: AttnState | None = None
) -> tuple[AttnState, LayerCache]:
    """Attend to all that the cache holds, and fold the mass into the statistics where the policy wants it.

    Args:
      cache: With the queries' own tokens appended, or not.
      queries: See `make_queries`.
      frozen: A window whose tokens do not settle drops each `window_limit` positions after it. True: measured from the
        newest token in the cache, for queries whose tokens stand elsewhere; False: from each query.
      beside: State over tokens that stand elsewhere, merged in.

    Returns:
      The merged state and the cache.
    """
    sinks = [] if cache.sinks is None else [_attend_sinks(cache, queries, cache.sinks, frozen)]
    window = attend_exact(queries, cache.window, _window_live(cache, queries, frozen))
    others = sinks + ([] if beside is None else [beside])
    num_sinks = cache.spec.policy.num_sinks
    if not cache.spec.policy.needs_probs:
        read = [_attend_rung(queries, tier, num_sinks) for tier in cache.tiers]
        cache = dataclasses.replace(cache, tiers=tuple(tier for _, tier in read))
        return merge_all([window[0], *others, *(state for state, _ in read)]), cache
    tiers = [
        (attend_tier(queries, tier, num_sinks), None) if tier.stat is None else _attend_whole(queries, tier, num_sinks)
        for tier in cache.tiers
    ]
    state = merge_all([window[0], *others, *(state for state, _ in tiers)])
    return state, _observe(cache, queries, state, window[1], [logits for _, logits in tiers])


def _attend_rung(queries: Queries, tier: Tier, num_sinks: int) -> tuple[AttnState, Tier]:
    """Attend to a tier, or to what queries select of it."""
    if tier.lookup is not None:
        return attend_selected(queries, tier, num_sinks)
    return attend_tier(queries, tier, num_sinks), tier


def attend_exact(queries: Queries, exact: Exact, live: jax.Array) -> tuple[AttnState, jax.Array]:
    """Attend to exact rows [B, K, S, D] where `live` bool[B, K or 1, R, S]; also returns the masked logits."""
    rows = Identity()
    pos = jnp.zeros(exact.k.shape[:3], jnp.int32)
    return from_logits(logits_of(queries, rows, exact.k, pos), live, mix_of(rows, exact.v, pos))


def _attend_sinks(cache: LayerCache, queries: Queries, sinks: Exact, frozen: bool) -> AttnState:
    """Attend to the sinks where they stand, or as if the evicted tokens after them had never been."""
    live = _sinks_live(cache, queries)
    if cache.spec.close_gap is not None:
        if cache.tiers:
            evicted = (cache.settled - sum(tier.limit for tier in cache.tiers))[:, None]
        else:
            evicted = _newest(cache, queries, frozen) + 1 - cache.spec.policy.num_sinks - cache.window_limit[:, None]
        by = jnp.broadcast_to(jnp.maximum(evicted, 0), queries.pos.shape)[:, None]
        queries = dataclasses.replace(queries, q=cache.spec.close_gap.turn_back(queries.q, by))
    return attend_exact(queries, sinks, live)[0]


def _attend_whole(queries: Queries, tier: Tier, num_sinks: int) -> tuple[AttnState, jax.Array]:
    """Attend to a tier at once and keep its logits."""
    pos = tier_pos(tier, num_sinks)
    logits = logits_of(queries, tier.k_codec, tier.k, pos)
    return from_logits(logits, visible(queries, pos), mix_of(tier.v_codec, tier.v, pos))


def _sinks_live(cache: LayerCache, queries: Queries) -> jax.Array:
    return visible(queries, sink_pos(cache))


def _window_live(cache: LayerCache, queries: Queries, frozen: bool) -> jax.Array:
    pos = window_pos(cache)
    live = visible(queries, pos)
    if cache.spec.rungs and cache.spec.policy.admits_later:
        return live
    oldest = _newest(cache, queries, frozen) - cache.window_limit[:, None]
    return live & (pos[:, :, None, :] > oldest[:, None, :, None])


def _newest(cache: LayerCache, queries: Queries, frozen: bool) -> jax.Array:
    """Position i32[B, R or 1] from which a ring counts what it dropped, see `attend_held`."""
    return cache.length[:, None] - 1 if frozen else queries.pos


def _live(logits: jax.Array) -> jax.Array:
    """Which masked logits are of visible tokens."""
    return logits > MASK_VALUE / 2


def _observe(
    cache: LayerCache, queries: Queries, state: AttnState, window: jax.Array, tiers: list[jax.Array | None]
) -> LayerCache:
    """Update the statistics that window and tiers keep, from their masked logits f32[B, K, R, S]."""
    policy, total, groups = cache.spec.policy, lse(state)[..., None], queries.groups
    num_tokens = queries.pos.shape[1] // groups
    real = jnp.ones(queries.pos.shape, bool) if queries.real is None else queries.real
    seen = sum(_live(logits)[:, :, :num_tokens].sum(-1) for logits in [window, *tiers] if logits is not None)
    if cache.sinks is not None:
        seen = seen + _sinks_live(cache, queries)[:, :, :num_tokens].sum(-1)
    step = Step(pos=jnp.where(real, queries.pos, -1)[:, :num_tokens], num_visible=seen)

    def fold(stat: Stat, logits: jax.Array, pos: jax.Array) -> Stat:
        live = _live(logits) & real[:, None, :, None]
        probs = jnp.where(live, jnp.exp(logits - total), 0.0)
        probs = probs.reshape(*probs.shape[:2], groups, num_tokens, -1)
        return policy.fold(stat, probs, pos, step)

    window_stat = fold(cache.window.stat, window, window_pos(cache))
    new_tiers = tuple(
        tier
        if logits is None
        else dataclasses.replace(tier, stat=fold(tier.stat, logits, tier_pos(tier, policy.num_sinks)))
        for tier, logits in zip(cache.tiers, tiers, strict=True)
    )
    return dataclasses.replace(cache, window=dataclasses.replace(cache.window, stat=window_stat), tiers=new_tiers)
