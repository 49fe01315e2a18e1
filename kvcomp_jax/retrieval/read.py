"""Reading a rung through its index: rank, gather what was selected, attend to that and nothing else."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.attention import AttnState, from_logits, merge, unit
from kvcomp_jax.codecs import Affine, Identity
from kvcomp_jax.retrieval.base import Selection, by_head, over_heads
from kvcomp_jax.retrieval.lookup import LookupState
from kvcomp_jax.tiers import (
    READ_BLOCK,
    Queries,
    Tier,
    as_stored,
    attend_tier,
    filled_slots,
    logits_of,
    mix_of,
    tier_pos,
)
from kvcomp_jax.units import take
from pallas_kernels.gather_decode import gather_decode


def attend_selected(queries: Queries, tier: Tier, num_sinks: int) -> tuple[AttnState, Tier]:
    """Attend from every query to the tokens that it selects, as single steps one after another would.

    A call with several tokens a row, such as a chunk of a later turn, thus costs a selection for each of them.
    """
    batch, heads, rows, head_dim = queries.q.shape
    state = cast(LookupState, tier.lookup)
    num_tokens, page_size = rows // queries.groups, state.lookup.index.page_size
    by_token = queries.q.reshape(batch, heads, queries.groups, num_tokens, head_dim)
    real = jnp.ones((batch, rows), bool) if queries.real is None else queries.real

    def step(state: LookupState, x: tuple[jax.Array, jax.Array]) -> tuple[LookupState, AttnState]:
        q, real = x  # [B, K, G, D], [B]
        num_pages, mine = tier.capacity // page_size, dataclasses.replace(queries, q=q)
        chosen, state = state.choose(q, filled_slots(tier), real, (tier.k, tier.v), num_pages)
        if state.pool is not None:
            return state, _attend_copies(mine, tier, state, state.copies_read(chosen, num_pages))
        return state, _attend(mine, tier, num_sinks, over_heads(chosen, heads))

    if num_tokens == 1:
        state, out = step(state, (by_token[:, :, :, 0], real[:, 0]))
        return out, dataclasses.replace(tier, lookup=state)
    state, outs = lax.scan(step, state, (jnp.moveaxis(by_token, 3, 0), real[:, :num_tokens].T))
    joined = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(batch, heads, rows, *x.shape[4:]), outs)
    return joined, dataclasses.replace(tier, lookup=state)


def _attend_copies(queries: Queries, tier: Tier, state: LookupState, live: jax.Array) -> AttnState:
    """Attend from q [B, K, G, D] to the copies at hand that are `live` bool[B, g, S], as to a small tier.

    They stand side by side, so that nothing is gathered. What is not live has no position.
    """
    shape, lists = queries.q.shape, state.lookup.lists
    k_codec, v_codec = jax.tree.map(lambda x: jnp.repeat(x, lists, 1), (tier.k_codec, tier.v_codec))
    capacity, (k, v) = live.shape[-1], state.pool
    whole = jnp.full_like(tier.entered, capacity)
    pos = by_head(jnp.where(live, 0, -1), shape[1] * lists)
    copies = {"k_codec": k_codec, "v_codec": v_codec, "k": k, "v": v, "pos": pos, "lookup": None}
    copies |= {"capacity": capacity, "entered": whole, "limit": whole}
    q = queries.q.reshape(shape[0], shape[1] * lists, -1, shape[3])
    queries = dataclasses.replace(queries, q=q, pos=jnp.zeros((shape[0], q.shape[2]), jnp.int32))
    found = attend_tier(queries, dataclasses.replace(tier, **copies), 0)
    return jax.tree.map(lambda x: x.reshape(*shape[:3], *x.shape[3:]), found)


def _attend(queries: Queries, tier: Tier, num_sinks: int, chosen: Selection) -> AttnState:
    """Attend from q [B, K, G, D] to a selection, in the bases that the rows are stored in."""
    stored = as_stored(tier)
    entered = dataclasses.replace(queries, q=tier.k_codec.enter(queries.q))
    if chosen.first is None and fused(stored):
        state = _attend_fused(entered, stored, chosen.page)
    else:
        state = _attend_gathered(entered, stored, num_sinks, chosen)
    return dataclasses.replace(state, acc=tier.v_codec.leave(state.acc))


def fused(tier: Tier) -> bool:
    """Whether a kernel reads the pages of a tier `as_stored` where they stand."""
    codecs = (tier.k_codec, tier.v_codec)
    return not any(codec.uses_pos for codec in codecs) and all(isinstance(c, Identity | Affine) for c in codecs)


def _attend_fused(queries: Queries, tier: Tier, page: jax.Array) -> AttnState:
    """Attend from q [B, K, G, D] to whole pages i32[B, K, G or 1, n] where they stand."""
    head_dim, size = queries.q.shape[-1], cast(LookupState, tier.lookup).lookup.index.page_size
    num_pages = tier.capacity // size

    def operand(codec: Identity | Affine, rows: jax.Array) -> tuple:
        if isinstance(codec, Affine):
            return rows, codec.format(head_dim)
        return rows.reshape(*rows.shape[:2], num_pages, size, head_dim), None

    k, k_format = operand(tier.k_codec, tier.k)
    v, v_format = operand(tier.v_codec, tier.v)
    length = jnp.clip(filled_slots(tier)[:, None] - jnp.arange(num_pages)[None] * size, 0, size)[:, None]
    options = {"k_format": k_format, "v_format": v_format, "soft_cap": queries.soft_cap}

    def attend(x: tuple[jax.Array, jax.Array]) -> AttnState:
        q, page = x  # [B, K, R, D], [B, K, n]
        acc, top, total = gather_decode(q, k, v, page, length, **options)
        return AttnState(acc=acc, max=top, sum=total)

    if page.shape[2] == 1:
        return attend((queries.q, page[:, :, 0]))
    each = lax.map(attend, (jnp.moveaxis(queries.q, 2, 0)[:, :, :, None], jnp.moveaxis(page, 2, 0)))
    return jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, 0], 0, 2), each)


def _attend_gathered(queries: Queries, tier: Tier, num_sinks: int, chosen: Selection) -> AttnState:
    """Gather encoded pages, some at a time, and contract them by `dot` and `mix`.

    Query heads with a selection each are read side by side, as if each were of a KV head of its own.
    """
    shape, (lists, num_found) = queries.q.shape, chosen.page.shape[2:]
    size = cast(LookupState, tier.lookup).lookup.index.page_size
    num_pages, num_blocks = tier.capacity // size, -(-num_found // max(READ_BLOCK // size, 1))
    at_once = -(-num_found // num_blocks)
    k_codec, v_codec = jax.tree.map(lambda x: jnp.repeat(x, lists, 1), (tier.k_codec, tier.v_codec))
    queries = dataclasses.replace(queries, q=queries.q.reshape(shape[0], shape[1] * lists, -1, shape[3]))

    def gather(rows: Any, page: jax.Array) -> Any:
        """Pages i32[B, K, G, n] of rows [B, K, S, ...] as [B, K * G, n * page_size, ...]."""
        found = take(rows, jnp.maximum(page, 0).reshape(*page.shape[:2], -1), num_pages)
        return jax.tree.map(lambda x: x.reshape(x.shape[0], x.shape[1] * lists, -1, *x.shape[3:]), found)

    def block(mine: Selection) -> AttnState:
        k, v = gather((tier.k, tier.v), mine.page)
        slot = jnp.arange(size, dtype=jnp.int32)[None, None, None, None]
        live = (slot < mine.end[..., None]) & (mine.page >= 0)[..., None]
        if mine.first is not None:
            live = live & (slot >= mine.first[..., None])
        live = live.reshape(*queries.q.shape[:2], 1, -1)
        pos = jnp.zeros((*live.shape[:2], live.shape[3]), jnp.int32)
        if k_codec.uses_pos or v_codec.uses_pos:
            every = jnp.broadcast_to(tier_pos(tier, num_sinks), (*shape[:2], tier.capacity))
            pos = gather(every, mine.page)
        return from_logits(logits_of(queries, k_codec, k, pos), live, mix_of(v_codec, v, pos))[0]

    def body(i: jax.Array, state: AttnState) -> AttnState:
        cut = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * at_once, at_once, 3), padded)
        return merge(state, block(cut))

    if num_blocks == 1:
        state = block(chosen)
    else:
        rest = ((0, 0), (0, 0), (0, 0), (0, num_blocks * at_once - num_found))
        padded = dataclasses.replace(
            jax.tree.map(lambda x: jnp.pad(x, rest), chosen), page=jnp.pad(chosen.page, rest, constant_values=-1)
        )
        start = jax.tree.map(lambda x: lax.slice_in_dim(x, 0, at_once, axis=3), padded)
        nothing = unit(jax.eval_shape(block, start).acc.shape)  # values may have another rank than queries
        state = lax.fori_loop(0, num_blocks, body, nothing)
    return jax.tree.map(lambda x: x.reshape(*shape[:3], *x.shape[3:]), state)
