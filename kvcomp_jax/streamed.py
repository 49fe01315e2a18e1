"""Attention inside a prompt as a stream would attend: each query reads what its cache would have stored by then.

So a prompt costs the arithmetic of its codecs and not that of exact rows, its output equals that of decoding it token
by token, and chunks change nothing. It is for ladders that go by age; ranked ones store what whole prompts decide.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.attention import AttnState, merge_all
from kvcomp_jax.cache import Exact
from kvcomp_jax.read import attend_exact
from kvcomp_jax.spec import LayerSpec, Rung
from kvcomp_jax.tiers import Queries, Tier, attend_by_blocks, served, visible
from pallas_kernels.prefill.blocked import query_blocks


def attend_streamed(
    spec: LayerSpec, q: jax.Array, staged: Exact, start: jax.Array, *, soft_cap: float | None = None
) -> AttnState:
    """Attend from a chunk of queries to the tokens staged so far, as `decode` would one after another.

    Args:
      spec: By age; its codecs bound.
      q: f32[B, K, G, T, D], scaled.
      staged: The chunk's tokens and those before it, [B, K, S, D] from the start of the text.
      start: i32[B], tokens before the chunk.
      soft_cap: As in `decode`.

    Returns:
      The state over all tokens that each query sees, of rows [B, K, G * T].
    """
    batch, heads, groups, num_queries, head_dim = q.shape
    tiers = [_whole(rung, spec, staged) for rung in spec.rungs]
    blocks, size = query_blocks(q)

    def one_block(args: tuple[jax.Array, jax.Array]) -> AttnState:
        i, rows = args  # rows [B, K, G, Q, D]
        queries = Queries(
            q=rows.reshape(batch, heads, -1, head_dim),
            pos=jnp.tile(start[:, None] + i * size + jnp.arange(size, dtype=jnp.int32)[None], (1, groups)),
            soft_cap=soft_cap,
            sliding_window=spec.sliding_window,
        )
        return _attend_block(spec, queries, staged, tiers, size)

    def joined(x: jax.Array) -> jax.Array:
        """[I, B, K, G * Q, *] -> [B, K, G * T, *]."""
        x = jnp.moveaxis(x.reshape(*x.shape[:3], groups, size, *x.shape[4:]), 0, 3)  # [B, K, G, I, Q, *]
        x = x.reshape(batch, heads, groups, -1, *x.shape[5:])[:, :, :, :num_queries]
        return x.reshape(batch, heads, groups * num_queries, *x.shape[4:])

    return jax.tree.map(joined, lax.map(one_block, (jnp.arange(blocks.shape[0]), blocks)))


def _attend_block(spec: LayerSpec, queries: Queries, staged: Exact, tiers: list[Tier], size: int) -> AttnState:
    """Attend from `size` tokens in a row to sinks, window and rungs."""
    sinks = spec.policy.num_sinks
    end = spec.settled_before(queries.pos - sinks) + sinks  # [B, R], where each query's window begins
    states = [_attend_window(spec, queries, staged, end, size)]
    if sinks:
        head = jax.tree.map(lambda x: x[:, :, :sinks], staged)
        pos = jnp.arange(head.k.shape[2], dtype=jnp.int32)[None, None]
        states.append(attend_exact(queries, head, visible(queries, pos))[0])
    for tier, rung in zip(tiers, spec.rungs, strict=True):
        first = jnp.maximum(end - rung.capacity, sinks)
        filled = jnp.minimum(end.max() - sinks, tier.limit)
        seen, back = served(_between(queries, first, end), tier)
        states.append(back(attend_by_blocks(seen, dataclasses.replace(tier, entered=filled), sinks)))
        end = first
    return merge_all(states)


def _attend_window(spec: LayerSpec, queries: Queries, staged: Exact, begin: jax.Array, size: int) -> AttnState:
    """Attend to the exact tokens from `begin` i32[B, R] on, cut out of the staged ones."""
    num_slots = staged.k.shape[2]
    taken = min(size + spec.window_slots, num_slots)
    first = jnp.clip(begin.min(1), 0, num_slots - taken)
    cut = jax.vmap(lambda x, at: lax.dynamic_slice_in_dim(x, at, taken, 1))
    exact = Exact(k=cut(staged.k, first), v=cut(staged.v, first), stat=None)
    pos = (first[:, None] + jnp.arange(taken, dtype=jnp.int32)[None])[:, None]
    here = _between(queries, begin, queries.pos + 1)
    return attend_exact(here, exact, visible(here, pos))[0]


def _between(queries: Queries, first: jax.Array, end: jax.Array) -> Queries:
    """The queries, seeing only positions first .. end - 1 (i32[B, R]) of what they saw."""
    if queries.sliding_window is not None:
        first = jnp.maximum(first, queries.pos - queries.sliding_window + 1)
    return dataclasses.replace(queries, since=first, pos=end - 1, sliding_window=None)


def _whole(rung: Rung, spec: LayerSpec, staged: Exact) -> Tier:
    """All staged tokens after the sinks, stored as a rung stores them."""
    if rung.heads is not None:
        staged = jax.tree.map(lambda x: x[:, jnp.array(rung.heads)], staged)
    rows, sinks = staged.k.shape[:2], spec.policy.num_sinks
    num_slots = -(-max(staged.k.shape[2] - sinks, 1) // spec.block_size) * spec.block_size
    pos = jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32) + sinks, (*rows, num_slots))

    def padded(x: jax.Array) -> jax.Array:
        x = x[:, :, sinks:]
        return jnp.pad(x, ((0, 0), (0, 0), (0, num_slots - x.shape[2]), (0, 0)))

    return Tier(
        k_codec=rung.k,
        v_codec=rung.v,
        k=rung.k.encode(padded(staged.k), pos),
        v=rung.v.encode(padded(staged.v), pos),
        pos=None,
        stat=None,
        entered=jnp.full(rows[0], num_slots, jnp.int32),
        limit=jnp.full(rows[0], num_slots, jnp.int32),
        capacity=num_slots,
        unit=rung.unit,
        heads=rung.heads,
    )
