"""A layer's cache: sinks, an exact window, a ladder of rungs; how tokens enter it and settle."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from kvcomp_jax.attention import check_qkv
from kvcomp_jax.codecs import Identity
from kvcomp_jax.ladder import Block, empty_lowest, keep_best, push
from kvcomp_jax.policies import Stat
from kvcomp_jax.spec import LayerSpec
from kvcomp_jax.tiers import Tier, init_tier, ring_index
from kvcomp_jax.types import pytree, static


@pytree
class Exact:
    """Exact rows of sinks or window."""

    k: jax.Array  # [B, K, S, D]
    v: jax.Array  # [B, K, S, D]
    stat: Stat | None  # [B, K, S, ...], what the policy remembers


@pytree
class LayerCache:
    """The KV cache of one layer. Every array leads with B and rows never interact."""

    spec: LayerSpec = static()
    sinks: Exact | None
    window: Exact  # ring: token `num_sinks + i` of a row stands in slot i % window_slots
    tiers: tuple[Tier, ...]
    length: jax.Array  # i32[B], tokens seen
    settled: jax.Array  # i32[B], tokens that left the window for the ladder
    window_limit: jax.Array  # i32[B], this row's exact window, <= spec.window


def init(spec: LayerSpec, *, batch: int, num_kv_heads: int, head_dim: int, dtype: Any) -> LayerCache:
    """Return an empty cache for `batch` rows.

    Args:
      spec: What the cache is.
      batch, num_kv_heads, head_dim: Sizes of k and v.
      dtype: Of exact tokens, e.g. jnp.bfloat16.

    Raises:
      ValueError: If a codec of `spec` cannot store rows of `head_dim` or blocks of `spec.block_size`, or has parameters
        that a prompt decides while `spec.prefill` wants them before.
    """
    spec = spec.bind(dtype)
    spec.check(head_dim)
    return _empty(spec, batch, num_kv_heads, head_dim, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty(spec: LayerSpec, batch: int, num_kv_heads: int, head_dim: int, dtype: Any) -> LayerCache:
    """Return an empty cache: one program for layers that are alike, where single operations would be dozens."""

    def exact(num_slots: int, keeps_stat: bool) -> Exact:
        slots = (batch, num_kv_heads, num_slots)
        k, v = jnp.zeros((*slots, head_dim), dtype), jnp.zeros((*slots, head_dim), dtype)
        return Exact(k=k, v=v, stat=spec.policy.new_stat(slots) if keeps_stat else None)

    tiers = tuple(
        init_tier(rung, step if spec.divided else None, spec, batch, num_kv_heads, head_dim, dtype)
        for rung, step in zip(spec.rungs, spec.steps, strict=True)
    )
    if spec.prefill == "stored" and any(codec.fits for rung in spec.rungs for codec in (rung.k, rung.v)):
        raise ValueError("prefill='stored' needs codecs without parameters that fit to a whole prompt.")
    return LayerCache(
        spec=spec,
        sinks=exact(spec.policy.num_sinks, False) if spec.policy.num_sinks else None,
        window=exact(spec.window_slots, spec.policy.keeps_stat),
        tiers=tiers,
        length=jnp.zeros(batch, jnp.int32),
        settled=jnp.zeros(batch, jnp.int32),
        window_limit=jnp.full(batch, spec.window, jnp.int32),
    )


def next_positions(length: jax.Array, num_tokens: int) -> jax.Array:
    """Positions i32[B, T] of the tokens that follow `length` i32[B] ones."""
    return length[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None]


def settle(cache: LayerCache, rows: jax.Array | None = None) -> LayerCache:
    """Move one block down the ladder in every row whose window holds `window + block_size` tokens.

    Due every `block_size` decoded tokens. Kept out of `decode`, so that a step neither branches nor rewrites.

    Args:
      cache: Any.
      rows: bool[B], only these: in a batch whose rows began at different times, each is due at its own. None is all.
    """
    spec = cache.spec
    if not spec.rungs:
        return cache
    size, tiers = spec.block_size, cache.tiers
    due = cache.length - spec.policy.num_sinks - cache.settled >= cache.window_limit + size
    due = due if rows is None else due & rows
    index = cache.settled[:, None] + jnp.arange(size, dtype=jnp.int32)[None]  # [B, P]
    slot = (index % spec.window_slots)[:, None]
    heads = cache.window.k.shape[:2]
    leaving = jax.tree.map(lambda x: jnp.take_along_axis(x, slot if x.ndim == 3 else slot[..., None], 2), cache.window)
    pos = jnp.where(due[:, None], index + spec.policy.num_sinks, -1)
    exact = Identity().bind(leaving.k.dtype)
    block = Block(
        k_codec=exact,
        v_codec=exact,
        k=leaving.k,
        v=leaving.v,
        pos=jnp.broadcast_to(pos[:, None], (*heads, size)),
        stat=leaving.stat,
    )
    if spec.keep < 1:
        block = keep_best(block, spec.policy, max(round(spec.keep * size), 1))
    if spec.policy.ranks_once:
        block = dataclasses.replace(block, stat=None)
    if spec.policy.admits_later:
        tiers = push(tiers, block, due, spec.policy)
    return thin(dataclasses.replace(cache, tiers=tiers, settled=cache.settled + jnp.where(due, size, 0)))


def thin(cache: LayerCache) -> LayerCache:
    """Evict the lowest `spec.drop` of the last rung's tokens in rows and heads where it is full."""
    spec = cache.spec
    if not spec.drop:
        return cache
    *upper, last = cache.tiers
    return dataclasses.replace(cache, tiers=(*upper, empty_lowest(last, lambda: _scores(cache, last), spec.drop)))


def _scores(cache: LayerCache, tier: Tier) -> jax.Array:
    """A policy's scores of a ranked rung's tokens; where keys matter, judged together with those of the window."""
    policy, pos = cache.spec.policy, cast(jax.Array, tier.pos)
    if not policy.judges_keys:
        return policy.score(tier.stat, pos)
    recent = jnp.broadcast_to(window_pos(cache), cache.window.k.shape[:3])
    k = jnp.concatenate([tier.k_codec.decode(tier.k, pos).astype(cache.window.k.dtype), cache.window.k], 2)
    stat = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 2), tier.stat, cache.window.stat)
    return policy.judge(stat, k, jnp.concatenate([pos, recent], 2))[..., : tier.capacity]


def append(cache: LayerCache, k: jax.Array, v: jax.Array, length: jax.Array | None = None) -> LayerCache:
    """Write tokens k, v [B, T, K, D] into sinks and window, T <= block_size."""
    num_sinks, num_slots = cache.spec.policy.num_sinks, cache.spec.window_slots
    step = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    length = jnp.full(k.shape[0], k.shape[1], jnp.int32) if length is None else length
    real = step < length[:, None]
    pos = cache.length[:, None] + step  # [B, T]
    slot = jnp.where(real & (pos >= num_sinks), (pos - num_sinks) % num_slots, num_slots)
    sinks = cache.sinks and _write(cache.sinks, jnp.where(real, pos, num_sinks), k, v)
    return dataclasses.replace(
        cache, window=_write(cache.window, slot, k, v), sinks=sinks, length=cache.length + length
    )


def _write(exact: Exact, slot: jax.Array, k: jax.Array, v: jax.Array) -> Exact:
    """Scatter k, v [B, T, K, D] to slots i32[B, T]; slots beyond the end are dropped."""
    b = jnp.arange(k.shape[0])[:, None, None]
    h = jnp.arange(k.shape[2])[None, :, None]
    at = slot[:, None]  # [B, 1, T]

    def one(x: jax.Array, new: jax.Array | int) -> jax.Array:
        return x.at[b, h, at].set(new, mode="drop")

    return Exact(
        k=one(exact.k, k.swapaxes(1, 2).astype(exact.k.dtype)),
        v=one(exact.v, v.swapaxes(1, 2).astype(exact.v.dtype)),
        stat=jax.tree.map(lambda x: one(x, 0), exact.stat),
    )


def window_pos(cache: LayerCache) -> jax.Array:
    """Text position of every slot of the window, i32[B, 1, S], -1 where dead."""
    num_sinks, num_slots = cache.spec.policy.num_sinks, cache.spec.window_slots
    written = jnp.maximum(cache.length - num_sinks, 0)
    index = ring_index(written, num_slots, num_slots)
    first = cache.settled if cache.spec.rungs else jnp.maximum(written - num_slots, 0)
    return jnp.where(index >= first[:, None], index + num_sinks, -1)[:, None]


def sink_pos(cache: LayerCache) -> jax.Array:
    """Text position of every sink, i32[B, 1, num_sinks], -1 where not yet seen."""
    pos = jnp.arange(cache.spec.policy.num_sinks, dtype=jnp.int32)[None]
    return jnp.where(pos < cache.length[:, None], pos, -1)[:, None]


def check_fits(exact: Exact, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raise ValueError unless q, k, v are attention inputs of the rows, heads and head_dim of a cache's exact rows."""
    check_qkv(q, k, v)
    batch, heads, _, head_dim = exact.k.shape
    if (k.shape[0], *k.shape[2:]) != (batch, heads, head_dim):
        raise ValueError(
            f"k and v {k.shape} do not fit a cache of batch={batch}, num_kv_heads={heads}, head_dim={head_dim}."
        )
