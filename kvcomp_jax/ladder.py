"""Tokens on the move: blocks enter a rung, what gives way goes to the next, and off the last one it is evicted."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.codecs import Codec, Encoded, Identity
from kvcomp_jax.heads import owners, side_by_side
from kvcomp_jax.orders import permute
from kvcomp_jax.policies import Policy, Stat
from kvcomp_jax.retrieval import LookupState
from kvcomp_jax.tiers import Tier, arranged
from kvcomp_jax.types import pytree
from kvcomp_jax.units import put, take

_PARTS = ("k", "v", "pos", "stat", "head")  # of tiers and blocks: what moves with a token


@pytree
class Block:
    """Tokens between two places. Every array is [B, K or 1, rows, ...] with rows proportional to tokens."""

    k_codec: Codec
    v_codec: Codec
    k: Encoded
    v: Encoded
    pos: jax.Array  # i32[B, K, P], -1 = no token
    stat: Stat | None  # [B, K, P, ...]
    head: jax.Array | None = None  # u8[B, 1, P], as in `Tier`


def push(tiers: tuple[Tier, ...], block: Block, due: jax.Array, policy: Policy) -> tuple[Tier, ...]:
    """Put a block on the first rung and what each rung displaces on the next, in rows that are due (bool[B])."""
    moved, these = [], tiers[0].heads
    if these is not None:
        block = dataclasses.replace(block, **jax.tree.map(lambda x: x[:, jnp.array(these)], _moving(block)))
    for tier in tiers:
        tier, block = insert(tier, block, due, policy)
        moved.append(tier)
    return tuple(moved)


def insert(tier: Tier, block: Block, due: jax.Array, policy: Policy) -> tuple[Tier, Block]:
    """Put a block on a rung, in rows that are due; return the rung and the block that it displaced.

    What gives way is the oldest, or the lowest scores among the rung's tokens and the new ones, a unit at a time; where
    rungs have shares, the block's own lowest scores.
    Codes move as they are between rungs of equal codecs and are taken anew otherwise.
    """
    if tier.keeps is not None:
        return _insert_share(tier, block, due, policy, tier.keeps)
    if tier.head is not None:
        batch, heads, size = block.pos.shape
        together = jax.tree.map(side_by_side, _moving(block))
        block = dataclasses.replace(block, head=owners(batch, heads, size), **together)
    if tier.lookup is not None:
        tier, block = _look_up(tier, tier.lookup, block, due)
    block = _transcode(block, tier)
    if tier.lookup is not None and tier.lookup.lookup.memory == "host":
        return _insert_on_host(tier, tier.lookup, block, due)
    return _insert_fifo(tier, block, due, policy) if policy.fifo else _insert_ranked(tier, block, due, policy)


def _insert_share(tier: Tier, block: Block, due: jax.Array, policy: Policy, num: int) -> tuple[Tier, Block]:
    """Overwrite the rung's oldest with the `num` highest scores of the block, in order of position; the rest goes on.

    The rest is passed as it came, so the block must be of single tokens.
    """
    size = block.pos.shape[-1]
    order = lax.top_k(policy.score(block.stat, block.pos), size)[1].astype(jnp.int32)

    def part(index: jax.Array) -> Block:
        return dataclasses.replace(block, **take(_moving(block), jnp.sort(index, -1), size))

    best = dataclasses.replace(part(order[..., :num]), stat=None)
    return _insert_fifo(tier, _transcode(best, tier), due, policy)[0], part(order[..., num:])


def _insert_fifo(tier: Tier, block: Block, due: jax.Array, policy: Policy) -> tuple[Tier, Block]:
    """Overwrite the oldest block of the ring."""
    size = block.pos.shape[-1]
    first, stored = _next_slot(tier, block, due)
    slot = (first // tier.unit)[:, None] + jnp.arange(size // tier.unit)[None]
    slot = jnp.broadcast_to(slot[:, None], (*block.pos.shape[:2], slot.shape[-1]))
    old = take(_stored(tier), slot, tier.capacity // tier.unit)
    new = _moving(block)
    if tier.pos is None:
        del new["pos"]
        index = tier.entered - tier.limit
        pos = (index + policy.num_sinks)[:, None] + jnp.arange(size)[None]
        pos = jnp.where((stored & (index >= 0))[:, None], pos, -1)
        old["pos"] = jnp.broadcast_to(pos[:, None], block.pos.shape)
    out = jax.tree.map(lambda x, y: jnp.where(expand(tier.limit > 0, x), x, y), old, _moving(block))
    slot = jnp.where(stored[:, None, None], slot, tier.capacity)
    kept = put(_stored(tier), slot, new, tier.capacity // tier.unit)
    entered = tier.entered + jnp.where(stored, size, 0)
    return dataclasses.replace(tier, entered=entered, **kept), dataclasses.replace(block, **out)


def _next_slot(tier: Tier, block: Block, due: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where in the ring a block goes, i32[B], and in which rows it does."""
    due = due & (block.pos[:, 0, 0] >= 0)  # a row's block is whole or absent
    stored = due & (tier.limit > 0)  # a rung without room passes its block on
    return tier.entered % jnp.maximum(tier.limit, 1), stored


def _look_up(tier: Tier, lookup: LookupState, block: Block, due: jax.Array) -> tuple[Tier, Block]:
    """Let a rung's index know what enters it, and put the block into the order that the index wants."""
    k = block.k_codec.decode(block.k, block.pos)
    lookup, order = lookup.add(k, *_next_slot(tier, block, due))
    if order is not None:
        exact = Identity().bind(k.dtype)
        v = block.v_codec.decode(block.v, block.pos)
        k, v, pos = (permute(x, order) for x in (k, v, block.pos))
        block = Block(k_codec=exact, v_codec=exact, k=k, v=v, pos=pos, stat=None)
    return dataclasses.replace(tier, lookup=lookup), block


def _insert_on_host(tier: Tier, lookup: LookupState, block: Block, due: jax.Array) -> tuple[Tier, Block]:
    """Write a block to a rung in host memory. It has room for all that comes, so that nothing gives way."""
    size, (first, stored) = lookup.lookup.index.page_size, _next_slot(tier, block, due)
    num_new = block.pos.shape[-1]
    page = (first // size)[:, None] + jnp.arange(num_new // size, dtype=jnp.int32)[None]
    page = jnp.where(stored[:, None], page, -1)[:, None]
    page = jnp.broadcast_to(page, (*block.pos.shape[:2], page.shape[-1]))
    (k, v), lookup = lookup.store((tier.k, tier.v), page, (block.k, block.v), tier.capacity // size)
    entered = tier.entered + jnp.where(stored, num_new, 0)
    tier = dataclasses.replace(tier, k=k, v=v, lookup=lookup, entered=entered)
    return tier, dataclasses.replace(block, pos=jnp.full_like(block.pos, -1))


def _insert_ranked(tier: Tier, block: Block, due: jax.Array, policy: Policy) -> tuple[Tier, Block]:
    """Replace the units with the lowest scores, among the rung's and the block's."""
    num_units, num_new = tier.capacity // tier.unit, block.pos.shape[-1] // tier.unit
    usable = (jnp.arange(num_units) * tier.unit)[None] < tier.limit[:, None]
    mine = jnp.where(usable[:, None], _unit_means(policy.score(tier.stat, tier.pos), tier.pos, tier.unit), jnp.inf)
    theirs = _unit_means(policy.score(block.stat, block.pos), block.pos, tier.unit)
    victims = lax.top_k(-jnp.concatenate([mine, theirs], -1), num_new)[1]  # [B, K, n]
    from_tier = victims < num_units
    stored, moving = _stored(tier), _moving(block)
    out = jax.tree.map(
        lambda x, y: jnp.where(expand(jnp.repeat(from_tier, x.shape[2] // num_new, 2), x), x, y),
        take(stored, victims, num_units),
        take(moving, victims - num_units, num_new),
    )
    out["pos"] = jnp.where(expand(due, out["pos"]), out["pos"], -1)
    # The block's survivors go to the slots that were freed, pairwise after sorting both to the front.
    newcomers = jnp.arange(num_units, num_units + num_new)[None, None, :, None]
    survivors = jnp.argsort((victims[:, :, None, :] == newcomers).any(-1), -1, stable=True)
    freed = jnp.take_along_axis(victims, jnp.argsort(~from_tier, -1, stable=True), -1)
    slot = jnp.where((freed < num_units) & due[:, None, None], freed, num_units)
    kept = put(stored, slot, take(moving, survivors, num_new), num_units)
    entered = tier.entered + jnp.where(due, block.pos.shape[-1], 0)
    return dataclasses.replace(tier, entered=entered, **kept), dataclasses.replace(block, **out)


def keep_best(block: Block, policy: Policy, num: int) -> Block:
    """The block without all but its `num` highest scores and those that are infinite."""
    score = policy.score(block.stat, block.pos)
    rank = jnp.argsort(jnp.argsort(-score, -1, stable=True), -1)
    return dataclasses.replace(block, pos=jnp.where((rank < num) | (score == jnp.inf), block.pos, -1))


def empty_lowest(tier: Tier, score: Callable[[], jax.Array], drop: int | float) -> Tier:
    """Evict a share, or an int of tokens, of a ranked rung where no unit is empty: those with the lowest scores.

    Rows and heads decide alone. `score()` gives the tokens' scores, f32[B, K, S]; it is called where it is needed.
    """
    num_units = tier.capacity // tier.unit
    limit = tier.limit // tier.unit
    usable = (jnp.arange(num_units)[None] < limit[:, None])[:, None]

    def empty(pos: jax.Array) -> jax.Array:
        worth = jnp.where(usable, _unit_means(score(), pos, tier.unit), jnp.inf)
        rank = jnp.argsort(jnp.argsort(worth, -1, stable=True), -1)
        lowest = full & (rank < _dropped(tier, drop)[:, None, None]) & usable
        return jnp.where(jnp.repeat(lowest, tier.unit, -1), -1, pos)

    pos = cast(jax.Array, tier.pos)  # ranked
    units = pos.reshape(*pos.shape[:2], num_units, tier.unit)
    full = ((units >= 0).any(-1) | ~usable).all(-1, keepdims=True)
    return dataclasses.replace(tier, pos=lax.cond(full.any(), empty, lambda pos: pos, pos))


def left_by_drop(tier: Tier, count: jax.Array, drop: int | float) -> jax.Array:
    """How many of a prompt's best tokens, i32[B], are to enter a rung that takes `count` and evicts when it is full.

    Tokens that share words are evicted together, a good one with its neighbours. Of a prompt they can be left out one
    by one. A rung of single tokens takes all, and `empty_lowest` chooses.
    """
    if not drop or tier.unit == 1:
        return count
    limit = tier.limit // tier.unit
    return jnp.where(count >= limit * tier.unit, (limit - _dropped(tier, drop)) * tier.unit, count)


def _dropped(tier: Tier, drop: int | float) -> jax.Array:
    """Units that a full rung evicts at once, i32[B]."""
    limit = tier.limit // tier.unit
    if isinstance(drop, float):
        return jnp.round(limit.astype(jnp.float32) * drop).astype(jnp.int32)
    return -(-drop // tier.unit) * jnp.ones_like(limit)


def expand(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Give a mask over x's leading axes x's rank."""
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))


def _stored(tier: Tier) -> dict[str, Any]:
    return {name: getattr(tier, name) for name in _PARTS if getattr(tier, name) is not None}


def _moving(block: Block) -> dict[str, Any]:
    return {name: getattr(block, name) for name in _PARTS if getattr(block, name) is not None}


def _unit_means(score: jax.Array, pos: jax.Array, size: int) -> jax.Array:
    """Mean score of the live tokens of each unit, -inf where there are none: f32[B, K, units]."""
    live = (pos >= 0).reshape(*pos.shape[:2], -1, size)
    total = jnp.where(live, score.reshape(live.shape), 0.0).sum(-1)
    count = live.sum(-1)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), -jnp.inf)


def _transcode(block: Block, tier: Tier) -> Block:
    old, new = (block.k_codec, block.v_codec), (tier.k_codec, tier.v_codec)
    # Codecs of equal structure have equal parameters, too: see `Codec.fit`.
    structures = [[jax.tree.structure(codec) for codec in pair] for pair in (old, new)]
    same = [a == b for a, b in zip(*structures, strict=True)]  # type: ignore[operator]
    pos, stat = block.pos, block.stat
    rows = [x if kept else c.decode(x, pos) for x, c, kept in zip((block.k, block.v), old, same, strict=True)]
    if not any(same):
        rows[0], rows[1], (pos, stat) = arranged(tier, rows[0], rows[1], (pos, stat))
    k, v = (x if kept else c.encode(x, pos) for x, c, kept in zip(rows, new, same, strict=True))
    return Block(k_codec=tier.k_codec, v_codec=tier.v_codec, k=k, v=v, pos=pos, stat=stat, head=block.head)
