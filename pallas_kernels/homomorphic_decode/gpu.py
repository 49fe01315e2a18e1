"""Homomorphic decode attention in Triton, Ampere and newer: 8-bit tensor cores, split over slots.

A program attends from the queries of one KV head to a range of slots, tile by tile; a tile is a whole number of
partitions of the values. Codes become int8 operands and nothing more; scales, offsets and sums correct the products.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import rows, triton_calls
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.homomorphic_decode.block_sizes import NUM_WARPS, VALUE_CHANNELS, gpu_sizes
from pallas_kernels.homomorphic_decode.partitions import centre, to_int8
from pallas_kernels.softmax_state import State
from pallas_kernels.triton_attention import LEAST, fold, merge, store_state
from pallas_kernels.triton_words import codes_in_order

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds a small float to an integer, ties to even


def homomorphic_decode(
    q: jax.Array,
    k: Quantized,
    v: Quantized,
    k_sums: jax.Array,
    v_sums: jax.Array,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    k_format: Format,
    v_format: Format,
    soft_cap: float | None,
    sliding_window: int | None,
    interpret: bool = False,
) -> State:
    """See `api.homomorphic_decode`."""
    (batch, heads, num_rows, dim), slots, size = q.shape, rows.num_slots(k, k_format), v_format.group_size
    if size < 32 or size & (size - 1):
        raise Unsupported(f"partitions of {size} tokens: 8-bit tensor cores take powers of two from 32.")
    codes, scale, offset = to_int8(q.astype(jnp.float32).reshape(*q.shape[:3], -1, k_format.group_size))
    sums = codes.sum(-1, dtype=jnp.int32).astype(jnp.float32)
    tile, tiles, splits = gpu_sizes(batch * heads, slots, size)
    padded = 8 if num_rows <= 8 else 16
    channels = min(VALUE_CHANNELS, triton.next_power_of_2(dim))
    split = jax.ShapeDtypeStruct((batch, heads, splits, num_rows), jnp.float32)
    acc, top, total = triton_calls.call(
        _attend,
        (codes, scale, offset, sums, *_arrays(k), k_sums, *_arrays(v), v_sums, length,
         *((length, length) if pos is None else (pos, q_pos))),
        [jax.ShapeDtypeStruct((*split.shape, dim), jnp.float32), split, split],
        (batch * heads, splits, triton.cdiv(num_rows, padded)),
        {
            "num_heads": heads,
            "num_rows": num_rows,
            "dim": dim,
            "num_slots": slots,
            "pos_heads": 0 if pos is None else pos.shape[1],
            "soft_cap": soft_cap or 0.0,
            "sliding_window": sliding_window or 0,
            "rows": padded,
            "tile": tile,
            "tiles": tiles,
            "part": max(32, triton.next_power_of_2(k_format.group_size)),
            "channels": channels,
            "passes": triton.cdiv(dim, channels),
            **_constants("k", k_format),
            **_constants("v", v_format),
        },
        interpret=interpret,
        num_warps=NUM_WARPS,
        num_stages=2,
    )  # fmt: skip
    return merge(acc, top, total)


def _arrays(x: Quantized) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scales and zero points; symmetric ones, which are not read, are something else."""
    return x.codes, x.scale, x.scale if x.zero_point is None else x.zero_point


def _constants(name: str, fmt: Format) -> dict:
    return {
        f"{name}_bits": fmt.bits,
        f"{name}_group": fmt.group_size,
        f"{name}_middle": fmt.num_levels // 2 if fmt.symmetric else -1,
        f"{name}_centre": centre(fmt),
    }


@triton.jit
def _attend(
    q_ptr, q_scale_ptr, q_offset_ptr, q_sums_ptr,  # i8[B, K, R, G, g] f32[B, K, R, G] three times
    k_ptr, k_scale_ptr, k_zero_ptr, k_sums_ptr, v_ptr, v_scale_ptr, v_zero_ptr, v_sums_ptr,
    length_ptr, pos_ptr, q_pos_ptr, acc_ptr, top_ptr, total_ptr,
    num_heads: tl.constexpr, num_rows: tl.constexpr, dim: tl.constexpr, num_slots: tl.constexpr,
    pos_heads: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr,
    rows: tl.constexpr, tile: tl.constexpr, tiles: tl.constexpr, part: tl.constexpr, channels: tl.constexpr,
    passes: tl.constexpr, k_bits: tl.constexpr, k_group: tl.constexpr, k_middle: tl.constexpr,
    k_centre: tl.constexpr, v_bits: tl.constexpr, v_group: tl.constexpr, v_middle: tl.constexpr,
    v_centre: tl.constexpr,
):  # fmt: skip
    """Attend from up to `rows` queries of one KV head to `tiles` tiles of slots."""
    head, split = tl.program_id(0), tl.program_id(1)
    batch, base = head // num_heads, head.to(tl.int64)
    row = tl.program_id(2) * rows + tl.arange(0, rows)
    length = tl.minimum(tl.load(length_ptr + batch), num_slots)
    q_pos = row
    if pos_heads > 0:
        q_pos = tl.load(q_pos_ptr + batch * num_rows + row, mask=row < num_rows, other=-1)
        pos_ptr += (head if pos_heads == num_heads else batch).to(tl.int64) * num_slots
    acc = ()
    for _ in tl.static_range(passes):
        acc = acc + (tl.zeros((channels, rows), tl.float32),)
    total, top = tl.zeros((rows,), tl.float32), tl.full((rows,), LEAST, tl.float32)
    first = split * tiles * tile
    for start in tl.range(first, tl.minimum(first + tiles * tile, length), tile):
        slot = start + tl.arange(0, tile)
        logits = tl.zeros((tile, rows), tl.float32)
        for group in tl.static_range(dim // k_group):
            logits += _dot(q_ptr, q_scale_ptr, q_offset_ptr, q_sums_ptr, k_ptr, k_scale_ptr, k_zero_ptr, k_sums_ptr,
                           base, start, row, group, num_rows, dim, num_slots, tile, part,
                           k_bits, k_group, k_middle, k_centre)  # fmt: skip
        p, keep, total, top = fold(logits, total, top, pos_ptr, slot, length, q_pos,
                                   pos_heads, soft_cap, sliding_window)  # fmt: skip
        p = tl.reshape(p, (tile // v_group, v_group, rows))
        low = tl.min(p, 1)
        scale = (tl.max(p, 1) - low) * (1 / 255)
        scale = tl.where(scale > 1e-30, scale, 0.0)
        inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
        codes = ((p - low[:, None, :]) * inverse[:, None, :] + _ROUND) - _ROUND
        codes = (tl.minimum(codes, 255.0) - 128.0).to(tl.int8)
        old, acc = acc, ()
        for index in tl.static_range(passes):
            more = _mix(codes, scale, low + 128 * scale, v_ptr, v_scale_ptr, v_zero_ptr, v_sums_ptr,
                        base, start, index, dim, num_slots, tile, channels,
                        v_bits, v_group, v_middle, v_centre)  # fmt: skip
            acc = acc + (old[index] * keep[None, :] + more,)
    store_state(acc, total, top, acc_ptr, top_ptr, total_ptr, base, split, row, num_rows, dim, channels, passes)


@triton.jit
def _dot(
    q_ptr, q_scale_ptr, q_offset_ptr, q_sums_ptr, k_ptr, scale_ptr, zero_ptr, sums_ptr,
    head, start, row, group_index: tl.constexpr, num_rows: tl.constexpr, dim: tl.constexpr, num_slots: tl.constexpr,
    tile: tl.constexpr, part: tl.constexpr,
    bits: tl.constexpr, group: tl.constexpr, middle: tl.constexpr, centre: tl.constexpr,
):  # fmt: skip
    """One partition's share of the logits f32[tile, R]."""
    exists, groups = row < num_rows, dim // group
    element = tl.arange(0, part)
    channel = group_index * group + element
    at = head * num_rows + row
    mask = (element < group)[:, None] & exists[None, :]
    q = tl.load(q_ptr + at[None, :] * dim + channel[:, None], mask=mask, other=0)  # [g, R]
    q_scale = tl.load(q_scale_ptr + at * groups + group_index, mask=exists, other=0.0)
    q_offset = tl.load(q_offset_ptr + at * groups + group_index, mask=exists, other=0.0)
    q_sums = tl.load(q_sums_ptr + at * groups + group_index, mask=exists, other=0.0)
    codes = _codes(k_ptr, head, start, channel, element < group, tile, num_slots, dim, bits)
    slot = tl.minimum(start + tl.arange(0, tile), num_slots - 1)
    scale, offset, sums = _metadata(scale_ptr, zero_ptr, sums_ptr, (head * num_slots + slot) * groups + group_index,
                                    slot >= 0, group, middle, centre)  # fmt: skip
    integers = tl.dot(codes, q, out_dtype=tl.int32).to(tl.float32)
    by_scale = q_scale[None, :] * integers + q_offset[None, :] * sums[:, None]
    by_offset = q_scale * q_sums + q_offset * group
    return by_scale * scale[:, None] + by_offset[None, :] * offset[:, None]


@triton.jit
def _mix(
    codes, p_scale, p_offset, v_ptr, scale_ptr, zero_ptr, sums_ptr,  # i8[n, g, R] f32[n, R] f32[n, R]
    head, start, index: tl.constexpr, dim: tl.constexpr, num_slots: tl.constexpr,
    tile: tl.constexpr, channels: tl.constexpr,
    bits: tl.constexpr, group: tl.constexpr, middle: tl.constexpr, centre: tl.constexpr,
):  # fmt: skip
    """What a tile of probabilities and some channels of its values add to acc: f32[channels, R]."""
    partitions: tl.constexpr = tile // group
    channel = index * channels + tl.arange(0, channels)
    values = _codes(v_ptr, head, start, channel, channel < dim, tile, num_slots, dim, bits)
    values = tl.permute(tl.reshape(values, (partitions, group, channels)), (0, 2, 1))  # [n, D, g]
    partition = tl.minimum(start // group + tl.arange(0, partitions), num_slots // group - 1)
    at = (head * (num_slots // group) + partition)[:, None] * dim + channel[None, :]
    scale, offset, sums = _metadata(scale_ptr, zero_ptr, sums_ptr, at, (channel < dim)[None, :],
                                    group, middle, centre)  # fmt: skip
    integers = tl.dot(values, codes, out_dtype=tl.int32).to(tl.float32)  # [n, D, R]
    p_sums = tl.sum(codes.to(tl.int32), 1).to(tl.float32)
    by_scale = p_scale[:, None, :] * integers + p_offset[:, None, :] * sums[:, :, None]
    by_offset = p_scale * p_sums + p_offset * group
    return tl.sum(by_scale * scale[:, :, None] + by_offset[:, None, :] * offset[:, :, None], 0)


@triton.jit
def _metadata(
    scale_ptr, zero_ptr, sums_ptr, at, exists, group: tl.constexpr, middle: tl.constexpr, centre: tl.constexpr
):
    """Scale, offset and sums of codes less `centre`, in float32."""
    scale = tl.load(scale_ptr + at, mask=exists, other=0).to(tl.float32)
    if middle >= 0:
        offset = -scale * middle
    else:
        offset = tl.load(zero_ptr + at, mask=exists, other=0).to(tl.float32)
    sums = tl.load(sums_ptr + at, mask=exists, other=0).to(tl.float32)
    return scale, offset + centre * scale, sums - centre * group


@triton.jit
def _codes(
    ptr, head, start, channel, exists,
    tile: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """Codes of consecutive slots less their centre: i8[tile, channels]."""
    codes = codes_in_order(ptr, head, start, channel, exists, tile, num_slots, dim, bits)
    return (codes.to(tl.int32) - 128).to(tl.int8) if bits == 8 else codes.to(tl.int8)
