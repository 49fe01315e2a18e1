"""Reading a rung through its index: rank, gather what was selected, attend to that and nothing else."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.attention import AttnState, from_logits, merge, unit
from kvcomp_jax.codecs import Affine, Identity
from kvcomp_jax.retrieval.base import Selection
from kvcomp_jax.retrieval.host import fetch
from kvcomp_jax.retrieval.lookup import LookupState
from kvcomp_jax.tiers import READ_BLOCK, Queries, Tier, as_stored, filled_slots, logits_of, mix_of, tier_pos
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
        chosen, state = state.choose(q, filled_slots(tier), real, (tier.k, tier.v), tier.capacity // page_size)
        return state, _attend(dataclasses.replace(queries, q=q), _at_hand(tier, state), num_sinks, chosen)

    if num_tokens == 1:
        state, out = step(state, (by_token[:, :, :, 0], real[:, 0]))
        return out, dataclasses.replace(tier, lookup=state)
    state, outs = lax.scan(step, state, (jnp.moveaxis(by_token, 3, 0), real[:, :num_tokens].T))
    joined = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(batch, heads, rows, *x.shape[4:]), outs)
    return joined, dataclasses.replace(tier, lookup=state)


def _at_hand(tier: Tier, state: LookupState) -> Tier:
    """A tier of the copies at hand, where there are some."""
    if state.pool is None:
        return tier
    capacity = state.lookup.num_pages * state.lookup.index.page_size
    whole = jnp.full_like(tier.entered, capacity)
    k, v = state.pool
    return dataclasses.replace(tier, k=k, v=v, capacity=capacity, entered=whole, limit=whole)


def _attend(queries: Queries, tier: Tier, num_sinks: int, chosen: Selection) -> AttnState:
    """Attend from q [B, K, G, D] to a selection, in the bases that the rows are stored in."""
    stored = as_stored(tier)
    entered = dataclasses.replace(queries, q=tier.k_codec.enter(queries.q))
    if chosen.page.shape[2] == 1:
        state = _attend_pages(entered, stored, num_sinks, jax.tree.map(lambda x: x[:, :, 0], chosen))
    else:

        def one(x: tuple[jax.Array, Selection]) -> AttnState:
            q, mine = x  # [B, K, D], [B, K, n]
            return _attend_pages(dataclasses.replace(entered, q=q[:, :, None]), stored, num_sinks, mine)

        each = lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (entered.q, chosen)))
        state = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, 0], 0, 2), each)
    return dataclasses.replace(state, acc=tier.v_codec.leave(state.acc))


def fused(tier: Tier) -> bool:
    """Whether a kernel reads the pages of a tier `as_stored` where they stand."""
    codecs = (tier.k_codec, tier.v_codec)
    return not any(codec.uses_pos for codec in codecs) and all(isinstance(c, Identity | Affine) for c in codecs)


def _attend_pages(queries: Queries, tier: Tier, num_sinks: int, chosen: Selection) -> AttnState:
    """Attend from q [B, K, R, D] to pages i32[B, K, n]."""
    if chosen.first is None and fused(tier) and not _read_from_host(tier):
        return _attend_fused(queries, tier, chosen)
    return _attend_gathered(queries, tier, num_sinks, chosen)


def _read_from_host(tier: Tier) -> bool:
    lookup = cast(LookupState, tier.lookup)
    return lookup.lookup.memory == "host" and lookup.pool is None


def _attend_fused(queries: Queries, tier: Tier, chosen: Selection) -> AttnState:
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
    acc, top, total = gather_decode(queries.q, k, v, chosen.page, length, **options)
    return AttnState(acc=acc, max=top, sum=total)


def _attend_gathered(queries: Queries, tier: Tier, num_sinks: int, chosen: Selection) -> AttnState:
    """Gather encoded pages, some at a time, and contract them by `dot` and `mix`."""
    size = cast(LookupState, tier.lookup).lookup.index.page_size
    num_found, num_pages = chosen.page.shape[-1], tier.capacity // size
    at_once = min(max(READ_BLOCK // size, 1), num_found)
    uses_pos = tier.k_codec.uses_pos or tier.v_codec.uses_pos
    rest = -num_found % at_once
    padded = dataclasses.replace(
        jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, rest))), chosen),
        page=jnp.pad(chosen.page, ((0, 0), (0, 0), (0, rest)), constant_values=-1),
    )

    def block(mine: Selection) -> AttnState:
        page = jnp.maximum(mine.page, 0)
        k, v = (fetch if _read_from_host(tier) else take)((tier.k, tier.v), page, num_pages)
        slot = jnp.arange(size, dtype=jnp.int32)[None, None, None]
        live = (slot < mine.end[..., None]) & (mine.page >= 0)[..., None]
        if mine.first is not None:
            live = live & (slot >= mine.first[..., None])
        pos = jnp.zeros((*page.shape[:2], page.shape[2] * size), jnp.int32)
        if uses_pos:
            pos = take(jnp.broadcast_to(tier_pos(tier, num_sinks), (*page.shape[:2], tier.capacity)), page, num_pages)
        logits = logits_of(queries, tier.k_codec, k, pos)
        live = live.reshape(*live.shape[:2], 1, -1)
        return from_logits(logits, live, mix_of(tier.v_codec, v, pos))[0]

    def body(i: jax.Array, state: AttnState) -> AttnState:
        cut = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * at_once, at_once, 2), padded)
        return merge(state, block(cut))

    if num_found == at_once:
        return block(chosen)
    return lax.fori_loop(0, (num_found + rest) // at_once, body, unit(queries.q.shape))
