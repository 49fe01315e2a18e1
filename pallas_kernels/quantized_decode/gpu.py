"""Decode attention over packed rows in Triton, Ampere and newer: split over slots, merged in plain JAX.

A program attends from the queries of one KV head to a range of slots, tile by tile. A tile is `words` words high, and
is worked on place by place: tokens word * places + place for one place at a time, so that unpacking a word is a shift
that keeps every element where the tensor cores want it. Products are [tokens, D] x [D, R] and [D, tokens] x
[tokens, R]: tokens and channels fill the long side, the few queries the short one.

Scales per channel multiply codes before they are rounded to the type of q; scales per token fold into logits and
probabilities, channels being cut into their groups, and codes enter the products as they are.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_calls
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.prefill.reference import MASK_VALUE
from pallas_kernels.quantized_decode.block_sizes import gpu_sizes

_DEAD = tl.constexpr(MASK_VALUE)


def quantized_decode(
    q: jax.Array,
    k: Quantized,
    v: Quantized,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    k_format: Format,
    v_format: Format,
    soft_cap: float | None,
    sliding_window: int | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.quantized_decode`."""
    batch, heads, rows, dim = q.shape
    slots = k.codes.shape[2] if k_format.bits == 8 else k.codes.shape[2] * 32 // k_format.bits
    for fmt in (k_format, v_format):
        if fmt.axis == "channel" and fmt.group_size % _per_word(fmt.bits):
            raise Unsupported(f"channel groups of {fmt.group_size} tokens cut words at {fmt.bits} bits.")
    places = max(_per_word(k_format.bits), _per_word(v_format.bits))
    sizes = gpu_sizes(batch * heads, slots, rows, places)
    positions = (length, length) if pos is None else (pos, q_pos)
    zeros = [x.scale if x.zero_point is None else x.zero_point for x in (k, v)]
    arrays = (q, k.codes, k.scale, zeros[0], v.codes, v.scale, zeros[1], length, *positions)
    f32, split = jnp.float32, (batch, heads, sizes.splits, rows)
    acc, top, total = triton_calls.call(
        _kernel,
        arrays,
        [jax.ShapeDtypeStruct((*split, dim), f32), jax.ShapeDtypeStruct(split, f32), jax.ShapeDtypeStruct(split, f32)],
        (batch * heads, sizes.splits, triton.cdiv(rows, sizes.rows)),
        {
            "num_heads": heads,
            "num_rows": rows,
            "dim": dim,
            "num_slots": slots,
            "pos_heads": 0 if pos is None else pos.shape[1],
            "soft_cap": soft_cap or 0.0,
            "sliding_window": sliding_window or 0,
            "rows": sizes.rows,
            "words": sizes.words,
            "places": places,
            "tiles": sizes.tiles,
            **_constants("k", k_format, dim),
            **_constants("v", v_format, dim),
        },
        interpret=interpret,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
    return merge(acc, top, total)


def merge(acc: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add up the states of splits: [B, K, splits, R, D] -> [B, K, R, D], [B, K, splits, R] -> [B, K, R]."""
    most = top.max(2)
    weight = jnp.exp(top - most[:, :, None])
    return (acc * weight[..., None]).sum(2), most, (total * weight).sum(2)


def _per_word(bits: int) -> int:
    """Tokens of a word of the wider plane."""
    return {2: 16, 3: 16, 4: 8, 8: 1}[bits]


def _constants(name: str, fmt: Format, dim: int) -> dict:
    """What the kernel must know of a format; channels are cut into `cut` parts, one per scale of a token."""
    group = fmt.group_size if fmt.axis == "token" else dim
    return {
        f"{name}_bits": fmt.bits,
        f"{name}_by_token": fmt.axis == "token",
        f"{name}_group": fmt.group_size,
        f"{name}_middle": fmt.num_levels // 2 if fmt.symmetric else -1,
        f"{name}_cut": triton.next_power_of_2(dim // group),
        f"{name}_part": max(16, triton.next_power_of_2(group)),
    }


@triton.jit
def _kernel(
    q_ptr, k_ptr, k_scale_ptr, k_zero_ptr, v_ptr, v_scale_ptr, v_zero_ptr, length_ptr, pos_ptr, q_pos_ptr,
    acc_ptr, top_ptr, total_ptr,  # [B, K, splits, R, D] [B, K, splits, R] [B, K, splits, R]
    num_heads: tl.constexpr, num_rows: tl.constexpr, dim: tl.constexpr, num_slots: tl.constexpr,
    pos_heads: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr,
    rows: tl.constexpr, words: tl.constexpr, places: tl.constexpr, tiles: tl.constexpr,
    k_bits: tl.constexpr, k_by_token: tl.constexpr, k_group: tl.constexpr, k_middle: tl.constexpr,
    k_cut: tl.constexpr, k_part: tl.constexpr,
    v_bits: tl.constexpr, v_by_token: tl.constexpr, v_group: tl.constexpr, v_middle: tl.constexpr,
    v_cut: tl.constexpr, v_part: tl.constexpr,
):  # fmt: skip
    """Attend from up to `rows` queries of one KV head to `tiles` tiles of slots."""
    head, split = tl.program_id(0), tl.program_id(1)
    batch, base, block = head // num_heads, head.to(tl.int64), words * places
    row = tl.program_id(2) * rows + tl.arange(0, rows)
    k_channel, k_exists = _channels(dim, k_group if k_by_token else dim, k_cut, k_part)
    v_channel, v_exists = _channels(dim, v_group if v_by_token else dim, v_cut, v_part)
    q_at = (base * num_rows + row)[None, None, :] * dim + k_channel[:, :, None]
    q_exists = k_exists[:, :, None] & (row < num_rows)[None, None, :]
    q = tl.load(q_ptr + q_at, mask=q_exists, other=0.0)  # [D/g, g, R]
    q_sum = tl.sum(q.to(tl.float32), 1)[:, None, :]
    length = tl.minimum(tl.load(length_ptr + batch), num_slots)
    q_pos = row
    if pos_heads > 0:
        q_pos = tl.load(q_pos_ptr + batch * num_rows + row, mask=row < num_rows, other=-1)
        pos_ptr += (head if pos_heads == num_heads else batch).to(tl.int64) * num_slots
    acc = tl.zeros((v_cut, v_part, rows), tl.float32)
    shift = tl.zeros((v_cut, words, rows), tl.float32)  # what zero points add to acc, before its sum over tokens
    total, top = tl.zeros((words, rows), tl.float32), tl.full((rows,), _DEAD, tl.float32)
    first = split * tiles * block
    for start in tl.range(first, tl.minimum(first + tiles * block, length), block):
        unit = start // places + tl.arange(0, words)
        logits = ()
        new_top = top
        for place in tl.static_range(places):
            x = _dot_keys(k_ptr, k_scale_ptr, k_zero_ptr, q, q_sum, base, unit, place, places, k_channel, k_exists,
                          num_slots, dim, k_bits, k_by_token, k_group, k_middle)  # fmt: skip
            if soft_cap > 0:
                x = soft_cap * _tanh(x / soft_cap)
            live = _live(pos_ptr, unit * places + place, q_pos, length, pos_heads, sliding_window)
            logits = logits + (tl.where(live, x, _DEAD),)
        most = logits[0]
        for place in tl.static_range(1, places):
            most = tl.maximum(most, logits[place])
        new_top = tl.maximum(top, tl.max(most, 0))
        keep = tl.exp(top - new_top)
        acc, shift, total = acc * keep[None, None, :], shift * keep[None, None, :], total * keep[None, :]
        top = new_top
        for place in tl.static_range(places):
            p = tl.where(logits[place] > _DEAD, tl.exp(logits[place] - top[None, :]), 0.0)
            total += p
            acc, shift = _add_values(acc, shift, p, v_ptr, v_scale_ptr, v_zero_ptr, base, unit, place, places,
                                     v_channel, v_exists, q.dtype,
                                     num_slots, dim, v_bits, v_by_token, v_group, v_middle)  # fmt: skip
    acc += tl.sum(shift, 1)[:, None, :]
    out = (base * tl.num_programs(1) + split) * num_rows + row
    exists = v_exists[:, :, None] & (row < num_rows)[None, None, :]
    tl.store(acc_ptr + out[None, None, :] * dim + v_channel[:, :, None], acc, mask=exists)
    tl.store(top_ptr + out, top, mask=row < num_rows)
    tl.store(total_ptr + out, tl.sum(total, 0), mask=row < num_rows)


@triton.jit
def _channels(dim: tl.constexpr, group: tl.constexpr, cut: tl.constexpr, part: tl.constexpr):
    """Channels in their groups, i32[D/g, g], padded to powers of two, and which of them exist."""
    group_index, element = tl.arange(0, cut)[:, None], tl.arange(0, part)[None, :]
    channel = group_index * group + element
    return channel, (channel < dim) & (element < group)


@triton.jit
def _live(pos_ptr, slot, q_pos, length, pos_heads: tl.constexpr, sliding_window: tl.constexpr):
    """Which slots the queries see: bool[words, 1 or R]."""
    live = (slot < length)[:, None]
    if pos_heads > 0:
        here = tl.load(pos_ptr + slot, mask=slot < length, other=-1)[:, None]
        live = live & (here >= 0) & (here <= q_pos[None, :])
        if sliding_window > 0:
            live = live & (here > q_pos[None, :] - sliding_window)
    return live


@triton.jit
def _dot_keys(
    ptr, scale_ptr, zero_ptr, q, q_sum, head, unit, place: tl.constexpr, places: tl.constexpr, channel, exists,
    num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr,
    by_token: tl.constexpr, group: tl.constexpr, middle: tl.constexpr,
):  # fmt: skip
    """Logits of the tokens at one place of each unit, f32[words, R]."""
    codes = _codes(ptr, head, unit[None, :, None], place, places, channel[:, None, :], exists[:, None, :],
                   num_slots, dim, bits)  # fmt: skip
    scale, zero = _metadata(scale_ptr, zero_ptr, head, unit[None, :, None], place, places, channel[:, None, :],
                            exists[:, None, :], num_slots, dim, by_token, group, middle)  # fmt: skip
    if by_token:
        x = tl.dot(codes.to(q.dtype), q, input_precision="tf32x3")  # [D/g, words, R]
        return tl.sum(x * scale + q_sum * (zero - _bias(bits) * scale), 0)
    codes = codes * scale + (zero - _bias(bits) * scale)
    return tl.sum(tl.dot(codes.to(q.dtype), q, input_precision="tf32x3"), 0)


@triton.jit
def _add_values(
    acc, shift, p, ptr, scale_ptr, zero_ptr, head, unit, place: tl.constexpr, places: tl.constexpr, channel, exists,
    dtype: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr,
    by_token: tl.constexpr, group: tl.constexpr, middle: tl.constexpr,
):  # fmt: skip
    """Add p f32[words, R] times the values at one place of each unit to acc [D/g, g, R]."""
    codes = _codes(ptr, head, unit[None, None, :], place, places, channel[:, :, None], exists[:, :, None],
                   num_slots, dim, bits)  # fmt: skip
    if by_token:
        scale, zero = _metadata(scale_ptr, zero_ptr, head, unit[None, :, None], place, places, channel[:, None, :],
                                exists[:, None, :], num_slots, dim, by_token, group, middle)  # fmt: skip
        scaled = (p[None] * scale).to(dtype)
        shift += p[None] * zero - _bias(bits) * scaled.to(tl.float32)
    else:
        scale, zero = _metadata(scale_ptr, zero_ptr, head, unit[None, None, :], place, places, channel[:, :, None],
                                exists[:, :, None], num_slots, dim, by_token, group, middle)  # fmt: skip
        codes = codes * scale + (zero - _bias(bits) * scale)
        scaled = p[None].to(dtype)
    return tl.dot(codes.to(dtype), scaled, acc, input_precision="tf32x3"), shift


@triton.jit
def _metadata(
    scale_ptr, zero_ptr, head, unit, place: tl.constexpr, places: tl.constexpr, channel, exists,
    num_slots: tl.constexpr, dim: tl.constexpr, by_token: tl.constexpr, group: tl.constexpr, middle: tl.constexpr,
):  # fmt: skip
    """Scales and zero points, f32: [D/g, words, 1] per token, shaped like `unit` x `channel` per channel."""
    if by_token:
        slot = tl.minimum(unit * places + place, num_slots - 1)
        index = tl.arange(0, channel.shape[0])[:, None, None]
        at = (head * num_slots + slot) * (dim // group) + index
        exists = index < dim // group
    else:
        first = tl.minimum(unit * places + place // group * group, num_slots - 1)
        at = (head * (num_slots // group) + first // group) * dim + channel
    scale = tl.load(scale_ptr + at, mask=exists, other=0.0).to(tl.float32)
    if middle >= 0:
        return scale, -scale * middle
    return scale, tl.load(zero_ptr + at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _codes(
    ptr, head, unit, place: tl.constexpr, places: tl.constexpr, channel, exists,
    num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """Bias plus codes of the tokens at one place of each unit, f32 shaped like `unit` x `channel`."""
    if bits == 8:
        slot = tl.minimum(unit * places + place, num_slots - 1)
        codes = tl.load(ptr + (head * num_slots + slot) * dim + channel, mask=exists, other=0)
        return (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    width: tl.constexpr = 2 if bits == 3 else bits  # of the plane of low bits
    per_word: tl.constexpr = 32 // width
    word = tl.minimum(unit * (places // per_word) + place // per_word, num_slots // per_word - 1)
    ptr += head * (num_slots * bits // 32) * dim
    row = word // 2 * 3 + word % 2 if bits == 3 else word
    codes = tl.load(ptr + row * dim + channel, mask=exists, other=0)
    codes = (codes >> (place % per_word * width)) & ((1 << width) - 1)
    if bits == 3:
        high = tl.load(ptr + (word // 2 * 3 + 2) * dim + channel, mask=exists, other=0)
        codes |= (high >> (word % 2 * 16 + place % 16).to(tl.uint32) & 1) << 2
    return ((codes << 16) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def _bias(bits: tl.constexpr):
    """What `_codes` adds: the float whose bits a code joins, exact in bfloat16 up to 7 bits."""
    return 0.0 if bits == 8 else 128.0


@triton.jit
def _tanh(x):
    """Hyperbolic tangent from exponentials that cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
