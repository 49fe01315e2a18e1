"""Decode attention in Triton, Ampere and newer: split over slots, merged in plain JAX.

A program attends from the queries of one KV head to a range of slots, tile by tile. A tile is `words` units high, and
is worked on place by place: see `triton_rows`. Slots are all of a head's, or those of pages that it selected.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import rows, triton_calls
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.quantized_decode.block_sizes import gpu_sizes
from pallas_kernels.softmax_state import MASK_VALUE, State
from pallas_kernels.triton_rows import add_values, channels, constants, dot_keys, quarters
from pallas_kernels.triton_words import bias_of, per_word

DEAD = tl.constexpr(MASK_VALUE)
LEAST = tl.constexpr(MASK_VALUE / 10)  # where maxima start: a dead slot's exponential is 0 before any live one is met


def attend(
    q: jax.Array,
    k: rows.Rows,
    v: rows.Rows,
    length: jax.Array,
    pos: jax.Array | None = None,
    q_pos: jax.Array | None = None,
    page_index: jax.Array | None = None,
    page_length: jax.Array | None = None,
    *,
    k_format: Format | None,
    v_format: Format | None,
    soft_cap: float | None,
    sliding_window: int | None = None,
    interpret: bool,
) -> State:
    """Attend from a few queries to rows of K [B, K, S, D] and V [B, K, S, D'], dense or quantised.

    Args:
      q: [B, K, R, D], already multiplied by the softmax scale.
      length: i32[B, K or 1]: how many slots are live; with pages, how many slots of the selected ones are worth a look.
      pos, q_pos: As in `quantized_decode`.
      page_index, page_length: As in `gather_decode`; None for all slots.

    Returns:
      The unnormalised state.
    """
    (batch, heads, num_rows, dim), slots = q.shape, rows.num_slots(k, k_format)
    for fmt in (k_format, v_format):
        if fmt is not None and fmt.axis == "channel" and fmt.group_size % per_word(fmt.bits):
            raise Unsupported(f"channel groups of {fmt.group_size} tokens cut words at {fmt.bits} bits.")
    places = max(1 if fmt is None else per_word(fmt.bits) for fmt in (k_format, v_format))
    page_size = 0 if page_length is None else slots // page_length.shape[-1]
    reach = slots if page_index is None else page_size * page_index.shape[-1]
    sizes = gpu_sizes(batch * heads, reach, num_rows, places, q.dtype == jnp.float32)
    optional = [length if x is None else x for x in (pos, q_pos, page_index, page_length)]
    split = jax.ShapeDtypeStruct((batch, heads, sizes.splits, num_rows), jnp.float32)
    acc, top, total = triton_calls.call(
        _attend,
        (q, *_arrays(k), *_arrays(v), length, *optional),
        [jax.ShapeDtypeStruct((*split.shape, rows.dim(v)), jnp.float32), split, split],
        (batch * heads, sizes.splits, triton.cdiv(num_rows, sizes.rows)),
        {
            "num_heads": heads,
            "num_rows": num_rows,
            "num_slots": slots,
            "reach": reach,
            "length_heads": length.shape[1],
            "page_size": page_size,
            "page_heads": 0 if page_length is None else page_length.shape[1],
            "pos_heads": 0 if pos is None else pos.shape[1],
            "soft_cap": soft_cap or 0.0,
            "sliding_window": sliding_window or 0,
            "rows": sizes.rows,
            "words": sizes.words,
            "places": places,
            "tiles": sizes.tiles,
            **constants("k", k_format, dim, sizes.key_channels, sizes.key_cuts),
            **constants("v", v_format, rows.dim(v), sizes.value_channels),
        },
        interpret=interpret,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
    return merge(acc, top, total)


def _arrays(x: rows.Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scales and zero points; what does not exist and is not read is something else."""
    if not isinstance(x, Quantized):
        return x, x, x
    return x.codes, x.scale, x.scale if x.zero_point is None else x.zero_point


def merge(acc: jax.Array, top: jax.Array, total: jax.Array) -> State:
    """Add up the states of splits: [B, K, splits, R, D] -> [B, K, R, D], [B, K, splits, R] -> [B, K, R]."""
    most = top.max(2)
    weight = jnp.exp(top - most[:, :, None])
    return (acc * weight[..., None]).sum(2), most, (total * weight).sum(2)


@triton.jit
def _attend(
    q_ptr, k_ptr, k_scale_ptr, k_zero_ptr, v_ptr, v_scale_ptr, v_zero_ptr, length_ptr,
    pos_ptr, q_pos_ptr, index_ptr, page_length_ptr,  # [B, K or 1, S] [B, R] [B, K, n] [B, K or 1, N]
    acc_ptr, top_ptr, total_ptr,  # [B, K, splits, R, D] [B, K, splits, R] [B, K, splits, R]
    num_heads: tl.constexpr, num_rows: tl.constexpr, num_slots: tl.constexpr, reach: tl.constexpr,
    length_heads: tl.constexpr, page_size: tl.constexpr, page_heads: tl.constexpr,
    pos_heads: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr,
    rows: tl.constexpr, words: tl.constexpr, places: tl.constexpr, tiles: tl.constexpr,
    k_dim: tl.constexpr, k_bits: tl.constexpr, k_by_token: tl.constexpr, k_group: tl.constexpr, k_middle: tl.constexpr,
    k_passes: tl.constexpr, k_cut: tl.constexpr, k_part: tl.constexpr, k_stride: tl.constexpr,
    v_dim: tl.constexpr, v_bits: tl.constexpr, v_by_token: tl.constexpr, v_group: tl.constexpr, v_middle: tl.constexpr,
    v_passes: tl.constexpr, v_cut: tl.constexpr, v_part: tl.constexpr, v_stride: tl.constexpr,
):  # fmt: skip
    """Attend from up to `rows` queries of one KV head to `tiles` tiles of slots."""
    head, split = tl.program_id(0), tl.program_id(1)
    batch, base, block = head // num_heads, head.to(tl.int64), words * places
    row = tl.program_id(2) * rows + tl.arange(0, rows)
    q = ()
    for part in tl.static_range(k_passes):
        channel, exists = channels(part, k_dim, k_cut, k_part, k_stride)
        at = (base * num_rows + row)[None, None, :] * k_dim + channel[:, :, None]
        mask = exists[:, :, None] & (row < num_rows)[None, None, :]
        q = q + (tl.load(q_ptr + at, mask=mask, other=0.0),)  # [D/g, g, R]
    length = tl.minimum(tl.load(length_ptr + head // (num_heads // length_heads)), reach)
    q_pos = row
    if pos_heads > 0:
        q_pos = tl.load(q_pos_ptr + batch * num_rows + row, mask=row < num_rows, other=-1)
        pos_ptr += (head if pos_heads == num_heads else batch).to(tl.int64) * num_slots
    if page_size > 0:
        index_ptr += base * (reach // page_size)
        page_length_ptr += (head if page_heads == num_heads else batch).to(tl.int64) * (num_slots // page_size)
    acc, shift, seen = (), (), ()
    for _ in tl.static_range(v_passes):
        acc = acc + (tl.zeros((v_cut, v_part, rows), tl.float32),)
        shift = shift + (tl.zeros((v_cut, words, rows), tl.float32),)  # zero points' share of acc, not yet summed
        seen = seen + (tl.zeros((v_cut, 16, rows), tl.float32),)  # what met biased codes, in each of 16 rows
    total, top = tl.zeros((words, rows), tl.float32), tl.full((rows,), LEAST, tl.float32)
    first = split * tiles * block
    for start in tl.range(first, tl.minimum(first + tiles * block, length), block):
        unit = start // places + tl.arange(0, words)
        live_places = length - unit * places
        if page_size > 0:
            unit, live_places = _in_pages(unit, live_places, places, index_ptr, page_length_ptr, page_size)
        logits = ()
        for _ in tl.static_range(places):
            logits = logits + (tl.zeros((words, rows), tl.float32),)
        for part in tl.static_range(k_passes):
            logits = dot_keys(logits, q[part], part, k_ptr, k_scale_ptr, k_zero_ptr, base, unit, places, num_slots,
                               k_dim, k_bits, k_by_token, k_group, k_middle, k_cut, k_part, k_stride)  # fmt: skip
        here = _positions(pos_ptr, unit, live_places, places, pos_heads, num_slots)
        p, most = (), top
        for place in tl.static_range(places):
            x = soft_cap * tanh(logits[place] / soft_cap) if soft_cap > 0 else logits[place]
            live = see(here[place], place < live_places, q_pos, pos_heads, sliding_window)
            p = p + (tl.where(live, x, DEAD),)
        peak = p[0]
        for place in tl.static_range(1, places):
            peak = tl.maximum(peak, p[place])
        most = tl.maximum(top, tl.max(peak, 0))
        keep, logits, p, top = tl.exp(top - most), p, (), most
        total *= keep[None, :]
        for place in tl.static_range(places):
            p = p + (tl.exp(logits[place] - top[None, :]),)
            total += p[place]
        old, acc, old_shift, shift, old_seen, seen = acc, (), shift, (), seen, ()
        for part in tl.static_range(v_passes):
            more, more_shift, more_seen = add_values(
                old[part] * keep[None, None, :], old_shift[part] * keep[None, None, :],
                old_seen[part] * keep[None, None, :], p, part, v_ptr, v_scale_ptr, v_zero_ptr, base, unit, places,
                q[0].dtype, num_slots, v_dim, v_bits, v_by_token, v_group, v_middle,
                v_cut, v_part, v_stride)  # fmt: skip
            acc, shift, seen = acc + (more,), shift + (more_shift,), seen + (more_seen,)
    out = (base * tl.num_programs(1) + split) * num_rows + row
    for part in tl.static_range(v_passes):
        channel, exists = channels(part, v_dim, v_cut, v_part, v_stride)
        mask = exists[:, :, None] & (row < num_rows)[None, None, :]
        x = acc[part]
        if v_by_token:
            x += (tl.sum(shift[part], 1) - tl.max(seen[part], 1) * bias_of(v_bits, q[0].dtype))[:, None, :]
        tl.store(acc_ptr + out[None, None, :] * v_dim + channel[:, :, None], x, mask=mask)
    tl.store(top_ptr + out, top, mask=row < num_rows)
    tl.store(total_ptr + out, tl.sum(total, 0), mask=row < num_rows)


@triton.jit
def _in_pages(unit, live_places, places: tl.constexpr, index_ptr, length_ptr, page_size: tl.constexpr):
    """Where units of the selected pages lie among all units, and how many places of each are live."""
    page = tl.load(index_ptr + unit * places // page_size, mask=live_places > 0, other=-1)
    inside = unit * places % page_size
    length = tl.load(length_ptr + tl.maximum(page, 0), mask=page >= 0, other=0)
    return (tl.maximum(page, 0) * page_size + inside) // places, length - inside


@triton.jit
def _positions(ptr, unit, live_places, places: tl.constexpr, pos_heads: tl.constexpr, num_slots: tl.constexpr):
    """Positions at each place of the units, a tuple of i32[words]; of what is not live, anything."""
    if pos_heads == 0 or places == 1:
        return (position(ptr, unit, live_places > 0, pos_heads),) * places
    else:
        near, out = tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :], ()
        for place in tl.static_range(0, places, 4):
            slot = tl.minimum((unit * places + place)[:, None, None], num_slots - 4) + near
            out = out + quarters(tl.load(ptr + slot))
        return out


@triton.jit
def position(ptr, slot, exists, pos_heads: tl.constexpr):
    """Positions of the slots that exist; where there are none, anything."""
    if pos_heads > 0:
        return tl.load(ptr + slot, mask=exists, other=-1)
    else:
        return slot


@triton.jit
def see(here, exists, q_pos, pos_heads: tl.constexpr, sliding_window: tl.constexpr):
    """Which of the slots that exist, at positions `here`, the queries see: bool[words, 1 or R]."""
    live = exists[:, None]
    if pos_heads > 0:
        here = here[:, None]
        live = live & (here >= 0) & (here <= q_pos[None, :])
        if sliding_window > 0:
            live = live & (here > q_pos[None, :] - sliding_window)
    return live


@triton.jit
def tanh(x):
    """Hyperbolic tangent from exponentials that cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def fold(
    logits, total, top, pos_ptr, slot, length, q_pos,
    pos_heads: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr,
):  # fmt: skip
    """Fold a tile of logits f32[tile, R] into the softmax: probabilities, what is kept of acc, new total and top."""
    if soft_cap > 0:
        logits = soft_cap * tanh(logits / soft_cap)
    here = position(pos_ptr, slot, slot < length, pos_heads)
    logits = tl.where(see(here, slot < length, q_pos, pos_heads, sliding_window), logits, DEAD)
    most = tl.maximum(top, tl.max(logits, 0))
    keep, p = tl.exp(top - most), tl.exp(logits - most[None, :])
    return p, keep, total * keep + tl.sum(p, 0), most


@triton.jit
def store_state(
    acc, total, top, acc_ptr, top_ptr, total_ptr, base, split, row,
    num_rows: tl.constexpr, dim: tl.constexpr, channels: tl.constexpr, passes: tl.constexpr,
):  # fmt: skip
    """Store one split's state; acc is a tuple of f32[channels, R]."""
    out = (base * tl.num_programs(1) + split) * num_rows + row
    for part in tl.static_range(passes):
        channel = part * channels + tl.arange(0, channels)
        mask = (channel < dim)[:, None] & (row < num_rows)[None, :]
        tl.store(acc_ptr + out[None, :] * dim + channel[:, None], acc[part], mask=mask)
    tl.store(top_ptr + out, top, mask=row < num_rows)
    tl.store(total_ptr + out, total, mask=row < num_rows)
