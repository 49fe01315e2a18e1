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


@triton.constexpr_function
def _per_word(bits: int) -> int:
    """Tokens of a word; at 3 bits of one of the low bits."""
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
    seen = tl.zeros((v_cut, 16, rows), tl.float32)  # what was multiplied by biased codes, in each of 16 rows
    total, top = tl.zeros((words, rows), tl.float32), tl.full((rows,), _LEAST, tl.float32)
    first = split * tiles * block
    for start in tl.range(first, tl.minimum(first + tiles * block, length), block):
        unit = start // places + tl.arange(0, words)
        logits, zero_logits = (), tl.zeros((k_cut, words, rows), tl.float32)
        for place in tl.static_range(places):
            x, zero_logits = _dot_keys(
                k_ptr, k_scale_ptr, k_zero_ptr, q, q_sum, zero_logits, base, unit, place, places, k_channel, k_exists,
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
        acc, shift, seen = acc * keep[None, None, :], shift * keep[None, None, :], seen * keep[None, None, :]
        total, top = total * keep[None, :], new_top
        for place in tl.static_range(places):
            p = tl.exp(logits[place] - top[None, :])
            total += p
            acc, shift, seen = _add_values(
                acc, shift, seen, p, v_ptr, v_scale_ptr, v_zero_ptr, base, unit, place, places, v_channel, v_exists,
                q.dtype, num_slots, dim, v_bits, v_by_token, v_group, v_middle)  # fmt: skip
    if v_by_token:
        acc += tl.sum(shift, 1)[:, None, :] - tl.max(seen, 1)[:, None, :] * _bias(v_bits, q.dtype)
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
    ptr, scale_ptr, zero_ptr, q, q_sum, zero_logits, head, unit, place: tl.constexpr, places: tl.constexpr,
    channel, exists, num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr,
    by_token: tl.constexpr, group: tl.constexpr, middle: tl.constexpr,
):  # fmt: skip
    """Logits of the tokens at one place of each unit, f32[words, R]; `zero_logits` of scaled codes, for its word."""
    unit, channel, exists = unit[None, :, None], channel[:, None, :], exists[:, None, :]
    low, high = _words(ptr, head, unit, place, places, channel, exists, num_slots, dim, bits)
    scale, zero = _metadata(scale_ptr, zero_ptr, head, unit, place, places, channel, exists,
                            num_slots, dim, by_token, group, middle)  # fmt: skip
    if not by_token and place % _per_word(bits) == 0 and _bias(bits, q.dtype) > 0:
        zero_logits = tl.dot(zero.to(q.dtype), q)
    if by_token:
        codes = _codes(low, high, bits, place, q.dtype)
        x = tl.dot(codes, q, input_precision="tf32x3")  # [D/g, words, R]
        x = x * scale + q_sum * (zero - _bias(bits, q.dtype) * scale)
    elif _bias(bits, q.dtype) > 0:
        codes = _scaled_codes(low, high, scale.to(q.dtype), bits, place)
        x = tl.dot(codes, q, zero_logits)
    else:
        codes = _codes(low, high, bits, place, tl.float32) * scale + zero
        x = tl.dot(codes.to(q.dtype), q, input_precision="tf32x3")
    return tl.sum(x, 0), zero_logits


@triton.jit
def _add_values(
    acc, shift, seen, p, ptr, scale_ptr, zero_ptr, head, unit, place: tl.constexpr, places: tl.constexpr,
    channel, exists, dtype: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr,
    by_token: tl.constexpr, group: tl.constexpr, middle: tl.constexpr,
):  # fmt: skip
    """Add p f32[words, R] times the values at one place of each unit to acc [D/g, g, R]."""
    low, high = _words(ptr, head, unit[None, None, :], place, places, channel[:, :, None], exists[:, :, None],
                       num_slots, dim, bits)  # fmt: skip
    if by_token:
        scale, zero = _metadata(scale_ptr, zero_ptr, head, unit[None, :, None], place, places, channel[:, None, :],
                                exists[:, None, :], num_slots, dim, by_token, group, middle)  # fmt: skip
        scaled = (p[None] * scale).to(dtype)
        shift += p[None] * zero
        if _bias(bits, dtype) > 0:
            seen = tl.dot(tl.full((acc.shape[0], 16, p.shape[0]), 1.0, dtype), scaled, seen)
        codes = _codes(low, high, bits, place, dtype)
    else:
        scale, zero = _metadata(scale_ptr, zero_ptr, head, unit[None, None, :], place, places, channel[:, :, None],
                                exists[:, :, None], num_slots, dim, by_token, group, middle)  # fmt: skip
        scaled = p[None].to(dtype)
        codes = (_codes(low, high, bits, place, tl.float32) * scale + zero).to(dtype)
    return tl.dot(codes, scaled, acc, input_precision="tf32x3"), shift, seen


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
    else:
        return scale, tl.load(zero_ptr + at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _words(
    ptr, head, unit, place: tl.constexpr, places: tl.constexpr, channel, exists,
    num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """What holds the codes at one place of each unit, shaped like `unit` x `channel`: bytes, or words.

    At 3 bits also the words of the high bits, shifted so that the token's bit is where its place says; else twice.
    """
    per_word: tl.constexpr = _per_word(bits)
    word = tl.minimum(unit * (places // per_word) + place // per_word, num_slots // per_word - 1)
    ptr += head * (num_slots if bits == 8 else num_slots * bits // 32) * dim
    if bits == 3:
        low = tl.load(ptr + (word // 2 * 3 + word % 2) * dim + channel, mask=exists, other=0)
        high = tl.load(ptr + (word // 2 * 3 + 2) * dim + channel, mask=exists, other=0)
        return low, high >> (word % 2 * 16).to(tl.uint32)
    else:
        low = tl.load(ptr + word * dim + channel, mask=exists, other=0)
        return low, low


@triton.jit
def _codes(low, high, bits: tl.constexpr, place: tl.constexpr, dtype: tl.constexpr):
    """Codes at one place, `_bias` added."""
    if bits == 8:
        codes = (low.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        return codes.to(dtype)
    elif dtype == tl.bfloat16:
        args = [low, high] if bits == 3 else [low]
        return tl.inline_asm_elementwise(
            _asm(bits, place, False), _constraints(bits, False), args, tl.bfloat16, True, 2
        )
    else:
        width: tl.constexpr = 2 if bits == 3 else bits
        codes = (low >> (place * width % 32)) & ((1 << width) - 1)
        if bits == 3:
            codes |= (high >> place % 16 & 1) << 2
        codes = ((codes << 16) | 0x43000000).to(tl.float32, bitcast=True) - 128.0
        return codes.to(dtype)


@triton.jit
def _scaled_codes(low, high, scale, bits: tl.constexpr, place: tl.constexpr):
    """Codes at one place times scales, in bfloat16, without a bias."""
    scale = tl.broadcast_to(scale, low.shape)
    args = [low, high, scale, scale * -128.0] if bits == 3 else [low, scale, scale * -128.0]
    return tl.inline_asm_elementwise(_asm(bits, place, True), _constraints(bits, True), args, tl.bfloat16, True, 2)


@triton.constexpr_function
def _asm(bits, place, scaled):
    """Two words to two codes in bfloat16: a code joins the bits of 128.0; if scaled, times $a plus $b = -128 $a."""
    width = 2 if bits == 3 else bits
    shift, mask = place * width % 32, (1 << width) - 1
    text = f"prmt.b32 t, $1, $2, {'0x5410' if shift < 16 else '0x7632'}; shr.b32 t, t, {shift % 16};"
    text += f" lop3.b32 t, t, {mask * 0x10001:#x}, 0x43004300, 0xEA;"
    if bits == 3:
        move = f"shr.b32 u, u, {place % 16 - 2}" if place % 16 >= 2 else f"shl.b32 u, u, {2 - place % 16}"
        text += f" prmt.b32 u, $3, $4, 0x5410; {move}; lop3.b32 t, u, 0x40004, t, 0xEA;"
    first = 5 if bits == 3 else 3
    end = f"fma.rn.bf16x2 $0, t, ${first}, ${first + 1};" if scaled else "shr.b32 $0, t, 0;"
    return "{ .reg .b32 t; .reg .b32 u; " + text + " " + end + " }"


@triton.constexpr_function
def _constraints(bits, scaled):
    return ",".join(["=r", *["r"] * ((4 if bits == 3 else 2) + 2 * scaled)])


@triton.constexpr_function
def _bias(bits, dtype):
    """What `_codes` leaves in: the float whose bits a code joins, exact in bfloat16 up to 7 bits."""
    return 128.0 if bits < 8 and dtype == tl.bfloat16 else 0.0


@triton.jit
def _tanh(x):
    """Hyperbolic tangent from exponentials that cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
