"""Decode attention over codes of non-uniform levels in Triton, Ampere and newer: split over slots.

A program attends from the queries of one KV head to a range of slots, tile by tile. Keys are decoded a pair of channel
ranges at a time, i and i + D / 2, so that a pair rotates in registers by an angle computed from its slot's position.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_calls
from pallas_kernels.codebook_decode.block_sizes import gpu_sizes
from pallas_kernels.codebook_decode.gpu_rows import decode_tile, load_levels, turn_pairs
from pallas_kernels.codebook_decode.rows import CodebookRows
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.softmax_state import State
from pallas_kernels.triton_attention import LEAST, fold, merge, store_state
from pallas_kernels.triton_products import precise_dot


def codebook_decode(
    q: jax.Array,
    k: CodebookRows,
    v: CodebookRows,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    soft_cap: float | None,
    sliding_window: int | None,
    interpret: bool = False,
) -> State:
    """See `api.codebook_decode`."""
    (batch, heads, num_rows, dim), slots = q.shape, k.num_slots
    if k.rope is not None and 2 * k.rope.shape[1] != dim:
        raise Unsupported(f"all {dim} channels of a head rotate here, not {2 * k.rope.shape[1]}.")
    pairs = triton.cdiv(dim, 2)
    sizes = gpu_sizes(batch * heads, slots, num_rows, pairs, dim)
    split = jax.ShapeDtypeStruct((batch, heads, sizes.splits, num_rows), jnp.float32)
    acc, top, total = triton_calls.call(
        _attend,
        (q, *_arrays(k), k.levels if k.rope is None else k.rope, *_arrays(v), length,
         *((length, length) if pos is None else (pos, q_pos))),
        [jax.ShapeDtypeStruct((*split.shape, dim), jnp.float32), split, split],
        (batch * heads, sizes.splits, triton.cdiv(num_rows, sizes.rows)),
        {
            "num_heads": heads,
            "num_rows": num_rows,
            "dim": dim,
            "num_slots": slots,
            "pos_heads": 0 if pos is None else pos.shape[1],
            "soft_cap": soft_cap or 0.0,
            "sliding_window": sliding_window or 0,
            "rows": sizes.rows,
            "tile": sizes.tile,
            "tiles": sizes.tiles,
            "turns": k.rope is not None,
            "pairs": sizes.pairs,
            "pair_passes": triton.cdiv(pairs, sizes.pairs),
            "channels": sizes.channels,
            "passes": triton.cdiv(dim, sizes.channels),
            **_constants("k", k, heads),
            **_constants("v", v, heads),
        },
        interpret=interpret,
        num_warps=sizes.num_warps,
        num_stages=2,
    )  # fmt: skip
    return merge(acc, top, total)


def _arrays(x: CodebookRows) -> tuple[jax.Array, ...]:
    """All arrays of rows but their rope; what does not exist and is not read is the levels."""
    return tuple(jnp.asarray(x.levels if array is None else array) for array in x[:-1])


def _constants(name: str, x: CodebookRows, heads: int) -> dict[str, Any]:
    """What the kernel must know of rows."""
    return {
        f"{name}_bits": x.bits,
        f"{name}_heads": heads if x.codes.shape[1] != heads else 1,  # that are joined
        f"{name}_scaled": x.scale is not None,
        f"{name}_shifted": x.zero_point is not None,
        f"{name}_outliers": x.num_outliers,
        f"{name}_by_channel": (x.channel_scale is not None) + 2 * (x.channel_zero_point is not None),
    }


@triton.jit
def _attend(
    q_ptr, k_ptr, k_levels_ptr, k_scale_ptr, k_zero_ptr, k_outlier_ptr, k_index_ptr, k_unit_ptr, k_offset_ptr,
    rope_ptr, v_ptr, v_levels_ptr, v_scale_ptr, v_zero_ptr, v_outlier_ptr, v_index_ptr, v_unit_ptr, v_offset_ptr,
    length_ptr, pos_ptr, q_pos_ptr, acc_ptr, top_ptr, total_ptr,
    num_heads: tl.constexpr, num_rows: tl.constexpr, dim: tl.constexpr, num_slots: tl.constexpr,
    pos_heads: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr, rows: tl.constexpr,
    tile: tl.constexpr, tiles: tl.constexpr, turns: tl.constexpr, pairs: tl.constexpr, pair_passes: tl.constexpr,
    channels: tl.constexpr, passes: tl.constexpr,
    k_bits: tl.constexpr, k_heads: tl.constexpr, k_scaled: tl.constexpr, k_shifted: tl.constexpr,
    k_outliers: tl.constexpr, k_by_channel: tl.constexpr,
    v_bits: tl.constexpr, v_heads: tl.constexpr, v_scaled: tl.constexpr, v_shifted: tl.constexpr,
    v_outliers: tl.constexpr, v_by_channel: tl.constexpr,
):  # fmt: skip
    """Attend from up to `rows` queries of one KV head to `tiles` tiles of slots."""
    head, split = tl.program_id(0), tl.program_id(1)
    batch, base, half = head // num_heads, head.to(tl.int64), (dim + 1) // 2
    row = tl.program_id(2) * rows + tl.arange(0, rows)
    length = tl.minimum(tl.load(length_ptr + batch), num_slots)
    q_pos = row
    if pos_heads > 0:
        q_pos = tl.load(q_pos_ptr + batch * num_rows + row, mask=row < num_rows, other=-1)
        pos_ptr += (head if pos_heads == num_heads else batch).to(tl.int64) * num_slots
    k_levels, v_levels = load_levels(k_levels_ptr, k_bits), load_levels(v_levels_ptr, v_bits)
    q_low, q_high, acc = (), (), ()
    for part in tl.static_range(pair_passes):
        pair = part * pairs + tl.arange(0, pairs)
        low, high = _queries(q_ptr, rope_ptr, base, row, pair, half, num_rows, dim, turns)
        q_low, q_high = q_low + (low,), q_high + (high,)
    for _ in tl.static_range(passes):
        acc = acc + (tl.zeros((channels, rows), tl.float32),)
    total, top = tl.zeros((rows,), tl.float32), tl.full((rows,), LEAST, tl.float32)
    first = split * tiles * tile
    for start in tl.range(first, tl.minimum(first + tiles * tile, length), tile):
        slot = start + tl.arange(0, tile)
        logits = tl.zeros((tile, rows), tl.float32)
        for part in tl.static_range(pair_passes):
            pair = part * pairs + tl.arange(0, pairs)
            a = decode_tile(k_ptr, k_levels, k_scale_ptr, k_zero_ptr, k_outlier_ptr, k_index_ptr, k_unit_ptr,
                            k_offset_ptr, base, start, pair, pair < half, tile, num_slots, dim, k_bits, k_heads,
                            k_scaled, k_shifted, k_outliers, k_by_channel)  # fmt: skip
            b = decode_tile(k_ptr, k_levels, k_scale_ptr, k_zero_ptr, k_outlier_ptr, k_index_ptr, k_unit_ptr,
                            k_offset_ptr, base, start, half + pair, half + pair < dim, tile, num_slots, dim, k_bits,
                            k_heads, k_scaled, k_shifted, k_outliers, k_by_channel)  # fmt: skip
            if turns:
                here = tl.load(pos_ptr + slot, mask=slot < length, other=0)
                a, b = turn_pairs(a, b, here, tl.load(rope_ptr + pair, mask=pair < half, other=0.0))
            logits = precise_dot(a.to(q_low[part].dtype), q_low[part], logits)
            logits = precise_dot(b.to(q_low[part].dtype), q_high[part], logits)
        p, keep, total, top = fold(logits, total, top, pos_ptr, slot, length, q_pos,
                                   pos_heads, soft_cap, sliding_window)  # fmt: skip
        p = p.to(q_low[0].dtype)
        old, acc = acc, ()
        for part in tl.static_range(passes):
            channel = part * channels + tl.arange(0, channels)
            x = decode_tile(v_ptr, v_levels, v_scale_ptr, v_zero_ptr, v_outlier_ptr, v_index_ptr, v_unit_ptr,
                            v_offset_ptr, base, start, channel, channel < dim, tile, num_slots, dim, v_bits, v_heads,
                            v_scaled, v_shifted, v_outliers, v_by_channel)  # fmt: skip
            acc = acc + (precise_dot(tl.trans(x.to(p.dtype)), p, old[part] * keep[None, :]),)
    store_state(acc, total, top, acc_ptr, top_ptr, total_ptr, base, split, row, num_rows, dim, channels, passes)


@triton.jit
def _queries(
    q_ptr, rope_ptr, head, row, pair, half: tl.constexpr, num_rows: tl.constexpr, dim: tl.constexpr,
    turns: tl.constexpr,
):  # fmt: skip
    """Both channels of some pairs of the queries, [pairs, R] each, times the factor of keys that rotate."""
    at = (head * num_rows + row)[None, :] * dim + pair[:, None]
    mask = (pair < half)[:, None] & (row < num_rows)[None, :]
    low = tl.load(q_ptr + at, mask=mask, other=0.0)
    high = tl.load(q_ptr + at + half, mask=mask & (half + pair < dim)[:, None], other=0.0)
    if turns:
        factor = tl.load(rope_ptr + half + pair, mask=pair < half, other=0.0)[:, None]
        return (low * factor).to(low.dtype), (high * factor).to(high.dtype)
    else:
        return low, high
