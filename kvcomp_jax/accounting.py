"""Bytes that caches hold: every array counted, live and allocated apart; before or after they exist."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvcomp_jax.cache import LayerCache, init
from kvcomp_jax.plan import CachePlan
from kvcomp_jax.prompt import PromptCache
from kvcomp_jax.spec import LayerSpec
from kvcomp_jax.tiers import Tier, tier_pos


class Bytes(NamedTuple):
    """Bytes over all layers and rows.

    allocated: Every array, full or empty. used: What live tokens occupy, less what they leave free of slots of fixed
    size, and all counters. metadata: The part of `used` that is neither codes nor exact values: scales, zero points,
    positions, statistics, counters, what indexes rank by. host: The part of `allocated` that stands in host memory.
    """

    allocated: int
    used: int
    metadata: int
    host: int = 0


class Recalls(NamedTuple):
    """What queries of rungs with pages at hand did over all layers, rows and groups of heads since their prompts.

    wanted: Pages that were looked for: the best of a step, or all that it reads. recalled: Those that were not at hand,
    and were brought in. bytes: What the latter hold, keys and values; it moves where rungs stand in host memory. A
    batch moves as many pages for each row and head as for the one that misses most, some at a time (`fetch_into`).
    """

    wanted: int
    recalled: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Occupancy:
    """Live tokens a row and KV head, i64[B] each."""

    sinks: np.ndarray
    window: np.ndarray
    tiers: tuple[np.ndarray, ...]


def nbytes(caches: Any) -> Bytes:
    """Count the bytes of a cache or any pytree of caches. Reads counters back from the device."""
    held = _caches(caches)
    totals = [_layer_bytes(cache, _occupancy(cache)) for cache in held]
    return Bytes(
        allocated=sum(x.nbytes for x in jax.tree.leaves(caches)),
        used=sum(used for used, _ in totals) + _staged_bytes(caches),
        metadata=sum(metadata for _, metadata in totals),
        host=sum(_host_bytes(cache) for cache in held),
    )


def recalls(caches: Any) -> Recalls:
    """Count the recalls of a cache or any pytree of caches. Reads counters back from the device."""
    total = Recalls(0, 0, 0)
    for cache in _caches(caches):
        _, heads, _, head_dim = cache.window.k.shape
        for tier in cache.tiers:
            if tier.lookup is None or tier.lookup.resident is None:
                continue
            resident, lookup = tier.lookup.resident, tier.lookup.lookup
            codecs, size = (tier.k_codec, tier.v_codec), lookup.index.page_size
            bits = lookup.lists * sum(codec.size(size, heads, head_dim)[0] for codec in codecs)
            wanted, recalled = int(np.asarray(resident.wanted).sum()), int(np.asarray(resident.recalled).sum())
            moved = recalled * bits // 8 // resident.page.shape[1]
            total = Recalls(total.wanted + wanted, total.recalled + recalled, total.bytes + moved)
    return total


def forecast(plan: CachePlan, lengths: Sequence[int], dtype: Any) -> Bytes:
    """Count the bytes that the caches of `plan` will hold after prompts of `lengths` tokens, without making them.

    Where sizes depend on data (see `Codec.spare_bits`), `used` is an upper bound: every slot is taken to be full.
    """
    row_plans = plan.row_plans(lengths)
    used = metadata = allocated = host = 0
    layout = plan.layout
    for layer, spec in enumerate(plan.specs):

        def make(spec: LayerSpec = spec) -> LayerCache:
            return init(
                spec, batch=len(lengths), num_kv_heads=layout.num_kv_heads, head_dim=layout.head_dim, dtype=dtype
            )

        cache = jax.eval_shape(make)
        allocated += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        host += _host_bytes(cache)
        rows = [_after_prompt(row.specs[layer], length) for row, length in zip(row_plans, lengths, strict=True)]
        layer_used, layer_metadata = _layer_bytes(cache, _stack(rows))
        used, metadata = used + layer_used, metadata + layer_metadata
    return Bytes(allocated=allocated, used=used, metadata=metadata, host=host)


def live_tokens(cache: LayerCache) -> np.ndarray:
    """Tokens that each row holds for one KV head, sinks, window and rungs together: i64[B].

    The mean where heads share slots; where some heads have none on the rungs, of one that has.
    """
    held = _occupancy(cache)
    return held.sinks + held.window + sum(held.tiers)


def _caches(tree: Any) -> list[LayerCache]:
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, LayerCache))
    found = [x for x in nodes if isinstance(x, LayerCache)]
    if not found:
        raise TypeError(f"nbytes needs a LayerCache or a pytree of them, got {type(tree).__name__}.")
    return found


def _host_bytes(cache: LayerCache) -> int:
    """Bytes that stand in host memory, full or empty."""
    rows = [(t.k, t.v) for t in cache.tiers if t.lookup is not None and t.lookup.lookup.memory == "host"]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows))


def _staged_bytes(tree: Any) -> int:
    """Live bytes of the exact tokens of prompts that are still open."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, PromptCache))
    total = 0
    for prompt in nodes:
        if isinstance(prompt, PromptCache):
            total += prompt.filled.nbytes
            if prompt.staged is not None:
                share = int(np.asarray(prompt.filled).sum()) * prompt.staged.k.shape[1]
                per_token = sum(
                    x.dtype.itemsize * (x.shape[-1] if x.ndim == 4 else 1) for x in jax.tree.leaves(prompt.staged)
                )
                total += share * per_token
    return total


def _layer_bytes(cache: LayerCache, held: _Occupancy) -> tuple[int, int]:
    """(used, metadata) of one layer; the cache's arrays may be mere shapes."""
    _, heads, _, head_dim = cache.window.k.shape
    exact = 2 * head_dim * jnp.dtype(cache.window.k.dtype).itemsize
    payload = heads * exact * int((held.sinks + held.window).sum())
    metadata = heads * int(held.window.sum()) * _stat_bytes(cache.window.stat)
    for tier, live in zip(cache.tiers, held.tiers, strict=True):
        served, per_token = heads if tier.heads is None else len(tier.heads), _stat_bytes((tier.stat, tier.head))
        for tokens in map(int, live):
            for codec in (tier.k_codec, tier.v_codec):
                total, extra = codec.size(tokens, served, head_dim)
                payload += (total - extra) // 8
                metadata += extra // 8
            metadata += served * tokens * (4 * (tier.pos is not None) + per_token)
            if tier.lookup is not None:
                metadata += tier.lookup.live_bytes(tokens)
                payload += tier.lookup.copied_bytes(tokens)
        payload -= _spare_bits(cache, tier) // 8
    counters = [cache.length, cache.settled, cache.window_limit]
    counters += [x for tier in cache.tiers for x in (tier.entered, tier.limit)]
    counters += jax.tree.leaves([(tier.k_codec, tier.v_codec) for tier in cache.tiers])  # the codecs' parameters
    metadata += sum(x.size * x.dtype.itemsize for x in counters)
    return payload + metadata, metadata


def _stat_bytes(stat: Any) -> int:
    """Bytes of what is kept beside one token, arrays [B, K, S, ...]."""
    return sum(x.dtype.itemsize * math.prod(x.shape[3:]) for x in jax.tree.leaves(stat))


def _spare_bits(cache: LayerCache, tier: Tier) -> int:
    """Bits of live units' slots that their data leave free; unknown, and so 0, where arrays are mere shapes."""
    if isinstance(cache.length, jax.ShapeDtypeStruct):
        return 0
    live, total = np.asarray(tier_pos(tier, cache.spec.policy.num_sinks)) >= 0, 0
    for codec, enc in ((tier.k_codec, tier.k), (tier.v_codec, tier.v)):
        spare = codec.spare_bits(enc)
        if spare is not None:
            here = live.any(1, keepdims=True) if codec.joins_heads else live
            taken = here.reshape(*here.shape[:2], spare.shape[-1], -1).any(-1)
            total += int(np.where(taken, np.asarray(spare, np.int64), 0).sum())
    return total


def _occupancy(cache: LayerCache) -> _Occupancy:
    length, settled, limit = (np.asarray(x, np.int64) for x in (cache.length, cache.settled, cache.window_limit))
    after_sinks = np.maximum(length - cache.spec.policy.num_sinks, 0)
    window = after_sinks - settled if cache.spec.rungs else np.minimum(after_sinks, limit)
    tiers = []
    for tier in cache.tiers:
        if tier.pos is None:
            tiers.append(np.minimum(np.asarray(tier.entered, np.int64), np.asarray(tier.limit)))
        else:
            tiers.append((np.asarray(tier.pos) >= 0).sum((1, 2)) // (tier.pos.shape[1] * tier.pooled))
    return _Occupancy(sinks=length - after_sinks, window=window, tiers=tuple(tiers))


def _after_prompt(spec: LayerSpec, length: int) -> _Occupancy:
    """What one row of `spec` holds after a prompt; mirrors `fill`."""
    after_sinks = max(length - spec.policy.num_sinks, 0)
    old = max(after_sinks - spec.window, 0)
    rooms = [rung.capacity - rung.reserve for rung in spec.rungs]
    in_blocks = spec.policy.fifo or spec.divided
    settled = old if not in_blocks and old > sum(rooms) else old - old % spec.prompt_step
    tiers, left = [], settled
    for room, step in zip(rooms, spec.steps, strict=True):
        share = settled // spec.block_size * step if spec.divided else min(left, room)
        tiers.append(np.array([min(share, room)]))
        left -= share
    if spec.drop and tiers[-1] == spec.rungs[-1].capacity:
        capacity, drop = spec.rungs[-1].capacity, spec.drop
        tiers[-1] -= min(drop, capacity) if isinstance(drop, int) else round(capacity * drop)
    window = after_sinks - settled if spec.rungs else min(after_sinks, spec.window)
    return _Occupancy(np.array([length - after_sinks]), np.array([window]), tuple(tiers))


def _stack(rows: list[_Occupancy]) -> _Occupancy:
    tiers = tuple(np.concatenate(parts) for parts in zip(*(row.tiers for row in rows), strict=True))
    return _Occupancy(np.concatenate([r.sinks for r in rows]), np.concatenate([r.window for r in rows]), tiers)
