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
from pallas_kernels.quantized_decode.block_sizes import KEY_CHANNELS, VALUE_CHANNELS, gpu_sizes
from pallas_kernels.quantized_decode.words import bias_of, biased_codes, load_words, per_word, scaled_codes

_DEAD = tl.constexpr(MASK_VALUE)
_LEAST = tl.constexpr(MASK_VALUE / 10)  # where maxima start: a dead slot's exponential is 0 before any live one is met


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
        if fmt.axis == "channel" and fmt.group_size % per_word(fmt.bits):
            raise Unsupported(f"channel groups of {fmt.group_size} tokens cut words at {fmt.bits} bits.")
    places = max(per_word(k_format.bits), per_word(v_format.bits))
    sizes = gpu_sizes(batch * heads, slots, rows, places)
    positions = (length, length) if pos is None else (pos, q_pos)
    zeros = [x.scale if x.zero_point is None else x.zero_point for x in (k, v)]
    arrays = (q, k.codes, k.scale, zeros[0], v.codes, v.scale, zeros[1], length, *positions)
    f32, split = jnp.float32, (batch, heads, sizes.splits, rows)
    acc, top, total = triton_calls.call(
        _attend,
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
            **_constants("k", k_format, dim, KEY_CHANNELS),
            **_constants("v", v_format, dim, VALUE_CHANNELS),
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


def _constants(name: str, fmt: Format, dim: int, width: int) -> dict:
    """What the kernel must know of a format.

    Channels are worked on in `passes` passes over `cut` cuts of `part` channels, `stride` apart and under one scale
    per token each: `width` channels at a time, whatever head_dim, bound the registers a tile takes.
    """
    group = fmt.group_size if fmt.axis == "token" else triton.next_power_of_2(dim)
    whole = group < 16 or group & (group - 1)  # a group that cannot be cut
    stride = group if whole else min(group, width)
    part = max(16, triton.next_power_of_2(stride))
    cut = min(max(1, width // part), triton.next_power_of_2(triton.cdiv(dim, stride)))
    return {
        f"{name}_bits": fmt.bits,
        f"{name}_by_token": fmt.axis == "token",
        f"{name}_group": fmt.group_size,
        f"{name}_middle": fmt.num_levels // 2 if fmt.symmetric else -1,
        f"{name}_passes": triton.cdiv(dim, stride * cut),
        f"{name}_cut": cut,
        f"{name}_part": part,
        f"{name}_stride": stride,
    }


@triton.jit
def _attend(
    q_ptr, k_ptr, k_scale_ptr, k_zero_ptr, v_ptr, v_scale_ptr, v_zero_ptr, length_ptr, pos_ptr, q_pos_ptr,
    acc_ptr, top_ptr, total_ptr,  # [B, K, splits, R, D] [B, K, splits, R] [B, K, splits, R]
    num_heads: tl.constexpr, num_rows: tl.constexpr, dim: tl.constexpr, num_slots: tl.constexpr,
    pos_heads: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr,
    rows: tl.constexpr, words: tl.constexpr, places: tl.constexpr, tiles: tl.constexpr,
    k_bits: tl.constexpr, k_by_token: tl.constexpr, k_group: tl.constexpr, k_middle: tl.constexpr,
    k_passes: tl.constexpr, k_cut: tl.constexpr, k_part: tl.constexpr, k_stride: tl.constexpr,
    v_bits: tl.constexpr, v_by_token: tl.constexpr, v_group: tl.constexpr, v_middle: tl.constexpr,
    v_passes: tl.constexpr, v_cut: tl.constexpr, v_part: tl.constexpr, v_stride: tl.constexpr,
):  # fmt: skip
    """Attend from up to `rows` queries of one KV head to `tiles` tiles of slots."""
    head, split = tl.program_id(0), tl.program_id(1)
    batch, base, block = head // num_heads, head.to(tl.int64), words * places
    row = tl.program_id(2) * rows + tl.arange(0, rows)
    q = ()
    for part in tl.static_range(k_passes):
        channel, exists = _channels(part, dim, k_cut, k_part, k_stride)
        at = (base * num_rows + row)[None, None, :] * dim + channel[:, :, None]
        mask = exists[:, :, None] & (row < num_rows)[None, None, :]
        q = q + (tl.load(q_ptr + at, mask=mask, other=0.0),)  # [D/g, g, R]
    length = tl.minimum(tl.load(length_ptr + batch), num_slots)
    q_pos = row
    if pos_heads > 0:
        q_pos = tl.load(q_pos_ptr + batch * num_rows + row, mask=row < num_rows, other=-1)
        pos_ptr += (head if pos_heads == num_heads else batch).to(tl.int64) * num_slots
    acc, shift, seen = (), (), ()
    for _ in tl.static_range(v_passes):
        acc = acc + (tl.zeros((v_cut, v_part, rows), tl.float32),)
        shift = shift + (tl.zeros((v_cut, words, rows), tl.float32),)  # zero points' share of acc, not yet summed
        seen = seen + (tl.zeros((v_cut, 16, rows), tl.float32),)  # what met biased codes, in each of 16 rows
    total, top = tl.zeros((words, rows), tl.float32), tl.full((rows,), _LEAST, tl.float32)
    first = split * tiles * block
    for start in tl.range(first, tl.minimum(first + tiles * block, length), block):
        unit = start // places + tl.arange(0, words)
        logits = ()
        for _ in tl.static_range(places):
            logits = logits + (tl.zeros((words, rows), tl.float32),)
        for part in tl.static_range(k_passes):
            logits = _dot_keys(logits, q[part], part, k_ptr, k_scale_ptr, k_zero_ptr, base, unit, places, num_slots,
                               dim, k_bits, k_by_token, k_group, k_middle, k_cut, k_part, k_stride)  # fmt: skip
        p, most = (), top
        for place in tl.static_range(places):
            x = soft_cap * _tanh(logits[place] / soft_cap) if soft_cap > 0 else logits[place]
            live = _live(pos_ptr, unit * places + place, q_pos, length, pos_heads, sliding_window)
            p = p + (tl.where(live, x, _DEAD),)
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
            more, more_shift, more_seen = _add_values(
                old[part] * keep[None, None, :], old_shift[part] * keep[None, None, :],
                old_seen[part] * keep[None, None, :], p, part, v_ptr, v_scale_ptr, v_zero_ptr, base, unit, places,
                q[0].dtype, num_slots, dim, v_bits, v_by_token, v_group, v_middle, v_cut, v_part, v_stride)  # fmt: skip
            acc, shift, seen = acc + (more,), shift + (more_shift,), seen + (more_seen,)
    out = (base * tl.num_programs(1) + split) * num_rows + row
    for part in tl.static_range(v_passes):
        channel, exists = _channels(part, dim, v_cut, v_part, v_stride)
        mask = exists[:, :, None] & (row < num_rows)[None, None, :]
        x = acc[part]
        if v_by_token:
            x += (tl.sum(shift[part], 1) - tl.max(seen[part], 1) * bias_of(v_bits, q[0].dtype))[:, None, :]
        tl.store(acc_ptr + out[None, None, :] * dim + channel[:, :, None], x, mask=mask)
    tl.store(top_ptr + out, top, mask=row < num_rows)
    tl.store(total_ptr + out, tl.sum(total, 0), mask=row < num_rows)


@triton.jit
def _channels(part_index: tl.constexpr, dim: tl.constexpr, cut: tl.constexpr, part: tl.constexpr, stride: tl.constexpr):
    """Channels of a pass, i32[cut, part], and which of them exist; true, if all do: masks hide what is consecutive."""
    element = tl.arange(0, part)[None, :]
    channel = (part_index * cut + tl.arange(0, cut))[:, None] * stride + element
    if stride == part and (part_index + 1) * cut * stride <= dim:
        exists = tl.full((cut, part), True, tl.int1)
    else:
        exists = (channel < dim) & (element < stride)
    return channel, exists


@triton.jit
def _groups(part_index: tl.constexpr, dim: tl.constexpr, cut: tl.constexpr, stride: tl.constexpr, group: tl.constexpr):
    """Which scale of a token each cut of a pass has, i32[cut, 1, 1], and which exist; visibly consecutive if so."""
    index = part_index * cut + tl.arange(0, cut)[:, None, None]
    if (part_index + 1) * cut * stride <= dim:
        exists = tl.full((cut, 1, 1), True, tl.int1)
    else:
        exists = index * stride < dim
    return index if stride == group else index * stride // group, exists


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
    logits, q, part_index: tl.constexpr, ptr, scale_ptr, zero_ptr, head, unit, places: tl.constexpr,
    num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr, by_token: tl.constexpr, group: tl.constexpr,
    middle: tl.constexpr, cut: tl.constexpr, part: tl.constexpr, stride: tl.constexpr,
):  # fmt: skip
    """Add a pass's share of the logits f32[words, R] of each place: q [cut, part, R] times keys."""
    channel, exists = _channels(part_index, dim, cut, part, stride)
    channel, exists = channel[:, None, :], exists[:, None, :]
    bias: tl.constexpr = bias_of(bits, q.dtype)
    q_sum = tl.sum(q.to(tl.float32), 1)[:, None, :]
    out = ()
    for place in tl.static_range(places):
        if place % per_word(bits) == 0:
            low, high = load_words(ptr, head, unit[None, :, None], place, places, channel, exists, num_slots, dim, bits)
        if by_token:
            if place % 4 == 0:
                scales, zeros = _of_tokens(scale_ptr, zero_ptr, head, unit, place, places, part_index,
                                           num_slots, dim, group, middle, cut, stride)  # fmt: skip
            scale, zero = _pair(scales, zeros, place % 4, middle)
            x = tl.dot(biased_codes(low, high, bits, place, q.dtype), q, input_precision="tf32x3")
            x = x * scale + q_sum * (zero - bias * scale)
        elif bias > 0:
            if place % per_word(bits) == 0:
                scale, zero = _of_channels(scale_ptr, zero_ptr, head, unit[None, :, None], place, places, channel,
                                           exists, num_slots, dim, group, middle)  # fmt: skip
                factor = tl.broadcast_to(scale.to(q.dtype), low.shape)
                zero_logits = tl.dot(zero.to(q.dtype), q)
            x = tl.dot(scaled_codes(low, high, factor, factor * -bias, bits, place), q, zero_logits)
        else:
            if place % per_word(bits) == 0:
                scale, zero = _of_channels(scale_ptr, zero_ptr, head, unit[None, :, None], place, places, channel,
                                           exists, num_slots, dim, group, middle)  # fmt: skip
            codes = biased_codes(low, high, bits, place, tl.float32) * scale + zero
            x = tl.dot(codes.to(q.dtype), q, input_precision="tf32x3")
        out = out + (logits[place] + tl.sum(x, 0),)
    return out


@triton.jit
def _add_values(
    acc, shift, seen, p, part_index: tl.constexpr, ptr, scale_ptr, zero_ptr, head, unit, places: tl.constexpr,
    dtype: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr, by_token: tl.constexpr,
    group: tl.constexpr, middle: tl.constexpr, cut: tl.constexpr, part: tl.constexpr, stride: tl.constexpr,
):  # fmt: skip
    """Add each place's p f32[words, R] times a pass's channels of the values to acc [cut, part, R]."""
    channel, exists = _channels(part_index, dim, cut, part, stride)
    channel, exists = channel[:, :, None], exists[:, :, None]
    for place in tl.static_range(places):
        if place % per_word(bits) == 0:
            low, high = load_words(ptr, head, unit[None, None, :], place, places, channel, exists, num_slots, dim, bits)
        if by_token:
            if place % 4 == 0:
                scales, zeros = _of_tokens(scale_ptr, zero_ptr, head, unit, place, places, part_index,
                                           num_slots, dim, group, middle, cut, stride)  # fmt: skip
            scale, zero = _pair(scales, zeros, place % 4, middle)
            scaled = (p[place][None] * scale).to(dtype)
            shift += p[place][None] * zero
            if bias_of(bits, dtype) > 0:
                seen = tl.dot(tl.full((cut, 16, unit.shape[0]), 1.0, dtype), scaled, seen)
            codes = biased_codes(low, high, bits, place, dtype)
        else:
            if place % per_word(bits) == 0:
                scale, zero = _of_channels(scale_ptr, zero_ptr, head, unit[None, None, :], place, places, channel,
                                           exists, num_slots, dim, group, middle)  # fmt: skip
            scaled = p[place][None].to(dtype)
            codes = (biased_codes(low, high, bits, place, tl.float32) * scale + zero).to(dtype)
        acc = tl.dot(codes, scaled, acc, input_precision="tf32x3")
    return acc, shift, seen


@triton.jit
def _of_channels(
    scale_ptr, zero_ptr, head, unit, place: tl.constexpr, places: tl.constexpr, channel, exists,
    num_slots: tl.constexpr, dim: tl.constexpr, group: tl.constexpr, middle: tl.constexpr,
):  # fmt: skip
    """Scales and zero points per channel of the words that start at a place, f32 shaped like `unit` x `channel`."""
    first = tl.minimum(unit * places + place, num_slots - 1)
    at = (head * (num_slots // group) + first // group) * dim + channel
    scale = tl.load(scale_ptr + at, mask=exists, other=0).to(tl.float32)
    if middle >= 0:
        return scale, -scale * middle
    else:
        return scale, tl.load(zero_ptr + at, mask=exists, other=0).to(tl.float32)


@triton.jit
def _of_tokens(
    scale_ptr, zero_ptr, head, unit, place: tl.constexpr, places: tl.constexpr, part_index: tl.constexpr,
    num_slots: tl.constexpr, dim: tl.constexpr, group: tl.constexpr, middle: tl.constexpr,
    cut: tl.constexpr, stride: tl.constexpr,
):  # fmt: skip
    """Scales and zero points per token at four places of each unit, if it has so many: tuples of [cut, units, 1].

    Four, because a load of a few bytes would not be asynchronous, and all would take too many registers.
    """
    index, exists = _groups(part_index, dim, cut, stride, group)
    if places == 1:
        slot = tl.minimum(unit, num_slots - 1)[None, :, None]
        at = (head * num_slots + slot) * (dim // group) + index
        scales = (tl.load(scale_ptr + at, mask=exists, other=0),)
        zeros = (tl.load(zero_ptr + at, mask=exists, other=0),) if middle < 0 else scales
    else:
        near = tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
        slot = tl.minimum((unit * places + place)[:, None, None], num_slots - 4) + near
        at = (head * num_slots + slot)[None] * (dim // group) + index[:, :, :, None]
        scales = _quarters(tl.load(scale_ptr + at, mask=exists[:, :, :, None], other=0))
        zeros = _quarters(tl.load(zero_ptr + at, mask=exists[:, :, :, None], other=0)) if middle < 0 else scales
    return scales, zeros


@triton.jit
def _quarters(x):
    """[cut, units, 2, 2] -> four [cut, units, 1], in order."""
    early, late = tl.split(tl.permute(x, (0, 1, 3, 2)))
    a, b = tl.split(early)
    c, d = tl.split(late)
    return a[:, :, None], b[:, :, None], c[:, :, None], d[:, :, None]


@triton.jit
def _pair(scales, zeros, index: tl.constexpr, middle: tl.constexpr):
    """A scale and its zero point in float32; symmetric formats have theirs at the middle code."""
    scale = scales[index].to(tl.float32)
    if middle >= 0:
        return scale, -scale * middle
    else:
        return scale, zeros[index].to(tl.float32)


@triton.jit
def _tanh(x):
    """Hyperbolic tangent from exponentials that cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
