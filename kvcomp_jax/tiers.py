"""A rung at run time: packed rows of K and V, where they stand in the text, and how they are read and replaced."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.attention import AttnState, from_logits, merge, unit
from kvcomp_jax.codecs import Affine, Codec, Encoded, Entropy, Homomorphic, Identity, Packs
from kvcomp_jax.codecs.low_rank import RANKS, Coefficients
from kvcomp_jax.heads import owners, side_by_side
from kvcomp_jax.orders import Order, permute
from kvcomp_jax.policies import Stat
from kvcomp_jax.retrieval import LookupState
from kvcomp_jax.retrieval.host import to_host
from kvcomp_jax.spec import LayerSpec, Rung
from kvcomp_jax.types import pytree, static
from pallas_kernels.codebook_decode import codebook_decode
from pallas_kernels.codebook_decode.rows import CodebookRows
from pallas_kernels.entropy_decode import entropy_decode
from pallas_kernels.formats import Format
from pallas_kernels.homomorphic_decode import homomorphic_decode
from pallas_kernels.low_rank_decode import low_rank_decode
from pallas_kernels.prefill.reference import capped
from pallas_kernels.quantized_decode import quantized_decode
from pallas_kernels.rows import Rows, dim

READ_BLOCK = 512  # tokens decoded at a time, so that a decoded block is used while it is in cache
_Formats = tuple[Format | None, Format | None]  # of keys and of values; None is dense
FUSED_ROWS = 64  # queries a KV head up to which a read is bound by bytes, and a fused kernel pays


@pytree
class Queries:
    """What a read needs to know of the queries."""

    q: jax.Array  # f32[B, K, R, D], scaled; R = G * T, group major
    pos: jax.Array  # i32[B, R], text positions
    real: jax.Array | None = None  # bool[B, R], False = padding; None = all real
    head: jax.Array | None = None  # u8[B, 1, R], KV head of each where slots have one, see `heads`
    since: jax.Array | None = None  # i32[B, R], first position that each sees; None = 0. Fused reads know no such bound
    soft_cap: float | None = static(default=None)
    sliding_window: int | None = static(default=None)
    groups: int = static(default=1)  # G


@pytree
class Tier:
    """One rung's tokens. Encoded arrays are [B, K or 1, rows, ...] with rows proportional to slots.

    Where `pooled` heads share them, `capacity`, `limit` and `entered` count the slots of all, and K is 1.
    """

    k_codec: Codec
    v_codec: Codec
    k: Encoded
    v: Encoded
    pos: jax.Array | None  # i32[B, K or 1, S], -1 = empty; None when they follow from `entered`, or nobody asks
    stat: Stat | None  # [B, K, S, ...], what the policy remembers; None when tokens are not ranked again
    head: jax.Array | None = None  # u8[B, 1, S], KV head that each slot serves; None: they have a head axis
    entered: jax.Array  # i32[B], tokens that ever arrived
    limit: jax.Array  # i32[B], slots that this row may use, <= capacity
    capacity: int = static()
    unit: int = static()
    keeps: int | None = static(default=None)  # tokens of each block that stay for good; None: all, until displaced
    order: Order | None = static(default=None)
    pooled: int = static(default=1)
    heads: tuple[int, ...] | None = static(default=None)  # KV heads of the layer that it serves; None: all
    lookup: LookupState | None = None  # by what queries choose what they read; None: they read all


def init_tier(
    rung: Rung, keeps: int | None, spec: LayerSpec, batch: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> Tier:
    """Return an empty tier.

    A divided ladder needs no positions: its tokens are never ranked again, and all that settled precede every query.
    Sliding windows and codecs that look at positions need them all the same.
    """
    num_kv_heads = num_kv_heads if rung.heads is None else len(rung.heads)
    pooled = num_kv_heads if spec.policy.pools_heads else 1
    num_kv_heads, capacity = num_kv_heads // pooled, rung.capacity * pooled
    slots = (batch, num_kv_heads, capacity)
    ranked, once = not spec.policy.fifo and keeps is None, spec.policy.ranks_once
    asked = keeps is not None and (spec.sliding_window is not None or rung.k.uses_pos or rung.v.uses_pos)

    def nothing(codec: Codec, tokens: int) -> Encoded:
        shape = (batch, num_kv_heads, tokens)
        rows, at = jax.ShapeDtypeStruct((*shape, head_dim), dtype), jax.ShapeDtypeStruct(shape, jnp.int32)
        shapes = jax.eval_shape(lambda x, pos: codec.encode(x, pos), rows, at)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    k_codec, v_codec = (codec.prepare(batch, num_kv_heads, head_dim) for codec in (rung.k, rung.v))
    k, v, lookup = nothing(k_codec, capacity), nothing(v_codec, capacity), None
    if rung.lookup is not None:
        sizes = (batch, num_kv_heads, capacity, spec.block_size, head_dim)
        lookup = rung.lookup.start(*sizes, dtype, lambda tokens: (nothing(k_codec, tokens), nothing(v_codec, tokens)))
        k, v = (k, v) if rung.lookup.memory == "device" else to_host((k, v))
    return Tier(
        k_codec=k_codec,
        v_codec=v_codec,
        k=k,
        v=v,
        pos=jnp.full(slots, -1, jnp.int32) if ranked or asked else None,
        stat=spec.policy.new_stat(slots) if spec.policy.keeps_stat and ranked and not once else None,
        head=jnp.zeros(slots, jnp.uint8) if pooled > 1 else None,
        entered=jnp.zeros(batch, jnp.int32),
        limit=jnp.full(batch, capacity, jnp.int32),
        capacity=capacity,
        unit=rung.unit,
        keeps=keeps,
        # Where positions follow from age, they are those of a unit's tokens only in the order of time. Without a
        # sliding window nobody looks: all that has settled is visible.
        order=None if spec.policy.fifo and spec.sliding_window is not None else rung.order,
        pooled=pooled,
        heads=rung.heads,
        lookup=lookup,
    )


def arranged(tier: Tier, k: jax.Array, v: jax.Array, rest: Any) -> tuple[jax.Array, jax.Array, Any]:
    """Put exact tokens k, v [B, K, S, D] and what goes with them, arrays [B, K, S], into the order of a tier."""
    if tier.order is None:
        return k, v, rest
    order = tier.order.arrange(tier.k_codec, tier.v_codec, k, v)
    return permute(k, order), permute(v, order), jax.tree.map(lambda x: permute(x, order), rest)


def ring_index(written: jax.Array, size: jax.Array | int, num_slots: int) -> jax.Array:
    """Which of the items 0 .. written-1 (i32[B]) each slot of a ring of `size` holds: i32[B, S], negative if none.

    Item i goes to slot i % size; slots at or beyond `size` hold nothing.
    """
    size = jnp.broadcast_to(jnp.asarray(size, jnp.int32), written.shape)
    lap = written - written % jnp.maximum(size, 1)  # first item of the lap being written
    slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
    index = slot + lap[:, None]
    index = jnp.where(index < written[:, None], index, index - size[:, None])
    return jnp.where(slot < size[:, None], index, -1)


def tier_pos(tier: Tier, num_sinks: int) -> jax.Array:
    """Text position of every slot, i32[B, K or 1, S], -1 where empty.

    In a divided ladder without positions, the order of arrival stands in for them: it is at most the position.
    """
    if tier.pos is not None:
        return tier.pos
    index = ring_index(tier.entered, tier.limit, tier.capacity)
    return jnp.where(index >= 0, index + num_sinks, -1)[:, None]


def visible(queries: Queries, pos: jax.Array, head: jax.Array | None = None) -> jax.Array:
    """Which slots each query sees: bool[B, K or 1, R, S] from pos i32[B, K or 1, S], and head as in `Tier`."""
    q_pos, pos = queries.pos[:, None, :, None], pos[:, :, None, :]
    live = (pos >= 0) & (pos <= q_pos)
    if head is not None and queries.head is not None:
        live = live & (queries.head[..., None] == head[:, :, None])
    if queries.since is not None:
        live = live & (pos >= queries.since[:, None, :, None])
    return live if queries.sliding_window is None else live & (pos > q_pos - queries.sliding_window)


def logits_of(queries: Queries, codec: Codec, k: Encoded, pos: jax.Array) -> jax.Array:
    """Capped logits of encoded keys, f32[B, K, R, S], for pos i32[B, K or 1, S]."""
    return capped(codec.dot(queries.q, k, pos), queries.soft_cap)


def mix_of(codec: Codec, v: Encoded, pos: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Return p -> p . V for encoded values."""
    return lambda p: codec.mix(p, v, pos)


def attend_tier(queries: Queries, tier: Tier, num_sinks: int) -> AttnState:
    """Attend to a tier, in the bases that its keys and values are stored in: queries enter, sums leave, once."""
    queries, back = served(queries, tier)
    entered = dataclasses.replace(queries, q=tier.k_codec.enter(queries.q))
    state = attend_stored(entered, as_stored(tier), num_sinks)
    return back(dataclasses.replace(state, acc=tier.v_codec.leave(state.acc)))


def served(queries: Queries, tier: Tier) -> tuple[Queries, Callable[[AttnState], AttnState]]:
    """The queries as a tier's arrays have heads, and what brings their state back to all KV heads."""
    batch, heads, rows, _ = shape = queries.q.shape
    if tier.heads is not None:
        these = jnp.array(tier.heads)

        def spread(state: AttnState) -> AttnState:
            return jax.tree.map(lambda x, y: x.at[:, these].set(y), unit(shape), state)

        return dataclasses.replace(queries, q=queries.q[:, these]), spread
    if tier.head is None:
        return queries, lambda state: state
    together = dataclasses.replace(
        queries, q=side_by_side(queries.q), pos=jnp.tile(queries.pos, (1, heads)), head=owners(batch, heads, rows)
    )
    return together, lambda state: jax.tree.map(lambda x: x.reshape(*shape[:3], *x.shape[3:]), state)


def as_stored(tier: Tier) -> Tier:
    """The same encodings, read in the bases that they are stored in."""
    return dataclasses.replace(tier, k_codec=tier.k_codec.stored, v_codec=tier.v_codec.stored)


def attend_stored(queries: Queries, tier: Tier, num_sinks: int) -> AttnState:
    """Attend to rows `as_stored` by a fused kernel where there is one."""
    fused = fused_kernel(tier)
    if fused is not None and queries.q.shape[2] <= FUSED_ROWS:
        return fused(queries, tier, num_sinks)
    return attend_by_blocks(queries, tier, num_sinks)


def attend_by_blocks(queries: Queries, tier: Tier, num_sinks: int) -> AttnState:
    """Attend to a tier by `dot` and `mix`; compressed rows are decoded a block at a time, never all at once."""
    pos = tier_pos(tier, num_sinks)
    step = tier.unit * max(READ_BLOCK // tier.unit, 1)
    if _is_exact(tier) or tier.capacity <= step:
        logits = logits_of(queries, tier.k_codec, tier.k, pos)
        return from_logits(logits, visible(queries, pos, tier.head), mix_of(tier.v_codec, tier.v, pos))[0]

    def block(j: jax.Array) -> AttnState:
        first = jnp.minimum(j * step, tier.capacity - step)
        k, v = (_slice_rows(x, first, step, tier.capacity) for x in (tier.k, tier.v))
        slots = first + jnp.arange(step)
        here = lax.dynamic_slice_in_dim(pos, first, step, 2)
        here = jnp.where((slots >= j * step)[None, None], here, -1)  # the last block may reach back
        head = tier.head if tier.head is None else lax.dynamic_slice_in_dim(tier.head, first, step, 2)
        logits = logits_of(queries, tier.k_codec, k, here)
        return from_logits(logits, visible(queries, here, head), mix_of(tier.v_codec, v, here))[0]

    nothing = unit(jax.eval_shape(block, jnp.int32(0)).acc.shape)  # values may have another rank than queries
    num_blocks = (filled_slots(tier).max() + step - 1) // step
    return lax.fori_loop(0, num_blocks, lambda j, state: merge(state, block(j)), nothing)


def fused_kernel(tier: Tier) -> Callable[[Queries, Tier, int], AttnState] | None:
    """The fused read of a tier `as_stored`, by its pair of codecs; None where there is only `dot` and `mix`."""
    if tier.head is not None:
        return None
    if _low_rank_rows(tier) is not None:
        return _attend_low_rank
    found = _FUSED.get((tier.k_codec.kind, tier.v_codec.kind))
    return _attend_codebook if found is None and _codebook_rows(tier) is not None else found


def _attend_quantized(queries: Queries, tier: Tier, num_sinks: int) -> AttnState:
    return _attend_fused(quantized_decode, (tier.k, tier.v), _formats(queries, tier), queries, tier, num_sinks)


def _attend_low_rank(queries: Queries, tier: Tier, num_sinks: int) -> AttnState:
    rows, formats = cast(tuple[tuple[Rows, Rows], _Formats], _low_rank_rows(tier))
    return _attend_fused(low_rank_decode, rows, formats, queries, tier, num_sinks)


def _attend_homomorphic(queries: Queries, tier: Tier, num_sinks: int) -> AttnState:
    k_codec, v_codec = cast(Homomorphic, tier.k_codec), cast(Homomorphic, tier.v_codec)
    rows = (tier.k.rows, tier.v.rows, k_codec.sums(tier.k), v_codec.sums(tier.v))
    return _attend_fused(homomorphic_decode, rows, _formats(queries, tier), queries, tier, num_sinks)


def _attend_fused(
    operation: Callable[..., Any],
    rows: tuple[Any, ...],
    formats: _Formats,
    queries: Queries,
    tier: Tier,
    num_sinks: int,
) -> AttnState:
    """Call an operation that takes queries, rows, the slots filled and, where they decide, positions."""
    by_age = tier.pos is None and queries.sliding_window is None  # then all that is there is visible
    acc, top, total = operation(
        queries.q,
        *rows,
        filled_slots(tier),
        None if by_age else tier_pos(tier, num_sinks),
        None if by_age else queries.pos,
        k_format=formats[0],
        v_format=formats[1],
        soft_cap=queries.soft_cap,
        sliding_window=queries.sliding_window,
    )
    return AttnState(acc=acc, max=top, sum=total)


def _formats(queries: Queries, tier: Tier) -> _Formats:
    """Formats of the codes of keys and values, which have as many channels as queries."""
    head_dim = queries.q.shape[-1]
    k_codec, v_codec = (cast(Affine | Homomorphic, codec) for codec in (tier.k_codec, tier.v_codec))
    return k_codec.format(head_dim), v_codec.format(head_dim)


def _low_rank_rows(tier: Tier) -> tuple[tuple[Rows, Rows], _Formats] | None:
    """Keys and values as operands of `low_rank_decode`, and their formats; None if they are not, or neither is reduced.

    Beside coefficients the other side may have all its channels.
    """
    codecs = (tier.k_codec, tier.v_codec)
    plain = [codec.inner if isinstance(codec, Coefficients) else codec for codec in codecs]
    if not any(isinstance(c, Coefficients) for c in codecs) or not all(isinstance(c, Identity | Affine) for c in plain):
        return None
    rows = (tier.k, tier.v)
    if any(dim(x) % RANKS for x in rows):
        return None
    k, v = (c.format(dim(x)) if isinstance(c, Affine) else None for c, x in zip(plain, rows, strict=True))
    return rows, (k, v)


def _attend_entropy(queries: Queries, tier: Tier, num_sinks: int) -> AttnState:
    k, k_lengths, k_format = cast(Entropy | Packs, tier.k_codec).operands(tier.k)
    v, v_lengths, v_format = cast(Entropy | Packs, tier.v_codec).operands(tier.v)
    by_age = tier.pos is None and queries.sliding_window is None
    acc, top, total = entropy_decode(
        queries.q,
        k,
        v,
        k_lengths,
        v_lengths,
        filled_slots(tier),
        None if by_age else tier_pos(tier, num_sinks),
        None if by_age else queries.pos,
        k_format=k_format,
        v_format=v_format,
        soft_cap=queries.soft_cap,
        sliding_window=queries.sliding_window,
    )
    return AttnState(acc=acc, max=top, sum=total)


def _attend_codebook(queries: Queries, tier: Tier, num_sinks: int) -> AttnState:
    k, v = cast(tuple[CodebookRows, CodebookRows], _codebook_rows(tier))
    by_age = tier.pos is None and queries.sliding_window is None and k.rope is None
    acc, top, total = codebook_decode(
        queries.q,
        k,
        v,
        filled_slots(tier),
        None if by_age else tier_pos(tier, num_sinks),
        None if by_age else queries.pos,
        soft_cap=queries.soft_cap,
        sliding_window=queries.sliding_window,
    )
    return AttnState(acc=acc, max=top, sum=total)


def _codebook_rows(tier: Tier) -> tuple[CodebookRows, CodebookRows] | None:
    """Keys and values as operands of `codebook_decode`, whose values do not rotate; None if they are not."""
    k, v = tier.k_codec.codebook_rows(tier.k), tier.v_codec.codebook_rows(tier.v)
    return None if k is None or v is None or v.rope is not None else (k, v)


_FUSED = {
    (Affine, Affine): _attend_quantized,
    ((Homomorphic, "token"), (Homomorphic, "channel")): _attend_homomorphic,
    **{(k, v): _attend_entropy for k in (Entropy, Packs) for v in (Entropy, Packs)},
}


def filled_slots(tier: Tier) -> jax.Array:
    """Slots of each row at or beyond which there is nothing, i32[B]."""
    in_order = tier.pos is None or tier.keeps is not None
    return jnp.minimum(tier.entered, tier.limit) if in_order else tier.limit


def _is_exact(tier: Tier) -> bool:
    plain = (codec.inner if isinstance(codec, Coefficients) else codec for codec in (tier.k_codec, tier.v_codec))
    return all(isinstance(codec, Identity) for codec in plain)


def _slice_rows(enc: Encoded, first: jax.Array, num_tokens: int, capacity: int) -> Encoded:
    """Rows of tokens first .. first + num_tokens of an encoding of `capacity` tokens."""

    def cut(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, first * x.shape[2] // capacity, num_tokens * x.shape[2] // capacity, 2)

    return jax.tree.map(cut, enc)
