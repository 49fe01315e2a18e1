"""Decode attention over packed rows in Triton, Ampere and newer: split over slots, merged in plain JAX.

A program attends from the queries of one KV head to a range of slots, tile by tile. Inside a tile tokens are ordered by
their place in a word first (token = word * per_word + place), so that unpacking is shifts without shuffles; masks
follow that order, and nothing else depends on it. Tiles multiply as [tokens, D] x [D, R] and [D, tokens] x [tokens, R]:
tokens and channels fill the tensor cores' long side, the few queries their short one.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_calls
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.packing import pack_unit
from pallas_kernels.prefill.reference import MASK_VALUE
from pallas_kernels.quantized_decode.block_sizes import gpu_sizes

_DEAD = tl.constexpr(MASK_VALUE)
_MAGIC = tl.constexpr(0x43000000)  # bits of 128.0; a code in the upper half is added exactly


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
    sizes = gpu_sizes(batch * heads, slots, rows, dim, max(pack_unit(f.bits) for f in (k_format, v_format)))
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
            "dim_padded": triton.next_power_of_2(dim),
            "block": sizes.block,
            "tiles": sizes.tiles,
            **_constants("k", k_format),
            **_constants("v", v_format),
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


def _constants(name: str, fmt: Format) -> dict:
    return {
        f"{name}_bits": fmt.bits,
        f"{name}_per_word": _per_word(fmt.bits),
        f"{name}_by_token": fmt.axis == "token",
        f"{name}_group": fmt.group_size,
        f"{name}_middle": fmt.num_levels // 2 if fmt.symmetric else -1,
    }


@triton.jit
def _kernel(
    q_ptr, k_ptr, k_scale_ptr, k_zero_ptr, v_ptr, v_scale_ptr, v_zero_ptr, length_ptr, pos_ptr, q_pos_ptr,
    acc_ptr, top_ptr, total_ptr,  # [B, K, splits, R, D] [B, K, splits, R] [B, K, splits, R]
    num_heads: tl.constexpr, num_rows: tl.constexpr, dim: tl.constexpr, num_slots: tl.constexpr,
    pos_heads: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr,
    rows: tl.constexpr, dim_padded: tl.constexpr, block: tl.constexpr, tiles: tl.constexpr,
    k_bits: tl.constexpr, k_per_word: tl.constexpr, k_by_token: tl.constexpr, k_group: tl.constexpr,
    k_middle: tl.constexpr,
    v_bits: tl.constexpr, v_per_word: tl.constexpr, v_by_token: tl.constexpr, v_group: tl.constexpr,
    v_middle: tl.constexpr,
):  # fmt: skip
    """Attend from up to `rows` queries of one KV head to `tiles` tiles of slots."""
    head, split = tl.program_id(0), tl.program_id(1)
    batch = head // num_heads
    row, channel = tl.program_id(2) * rows + tl.arange(0, rows), tl.arange(0, dim_padded)
    row_at = head.to(tl.int64) * num_rows + row
    exists = (row < num_rows)[None, :] & (channel < dim)[:, None]
    q = tl.load(q_ptr + row_at[None, :] * dim + channel[:, None], mask=exists, other=0.0)  # [D, R]
    length = tl.minimum(tl.load(length_ptr + batch), num_slots)
    q_pos = row
    if pos_heads > 0:
        q_pos = tl.load(q_pos_ptr + batch * num_rows + row, mask=row < num_rows, other=-1)
        pos_ptr += (head if pos_heads == num_heads else batch).to(tl.int64) * num_slots
    base = head.to(tl.int64)
    acc = tl.zeros((dim_padded, rows), tl.float32)
    top, total = tl.full((rows,), _DEAD, tl.float32), tl.zeros((rows,), tl.float32)
    first = split * tiles * block
    for start in tl.range(first, tl.minimum(first + tiles * block, length), block):
        k = _rows(k_ptr, k_scale_ptr, k_zero_ptr, base, start, channel, num_slots, dim, block, q.dtype,
                  k_bits, k_per_word, k_by_token, k_group, k_middle)  # fmt: skip
        logits = tl.dot(k, q, input_precision="tf32x3")  # [P, R]
        if soft_cap > 0:
            logits = soft_cap * _tanh(logits / soft_cap)
        slot = start + _tokens(block, k_per_word)
        live = (slot < length)[:, None]
        if pos_heads > 0:
            here = tl.load(pos_ptr + slot, mask=slot < length, other=-1)[:, None]
            live = live & (here >= 0) & (here <= q_pos[None, :])
            if sliding_window > 0:
                live = live & (here > q_pos[None, :] - sliding_window)
        logits = tl.where(live, logits, _DEAD)
        new_top = tl.maximum(top, tl.max(logits, 0))
        keep, p = tl.exp(top - new_top), tl.where(live, tl.exp(logits - new_top[None, :]), 0.0)
        top, total = new_top, total * keep + tl.sum(p, 0)
        v = _rows(v_ptr, v_scale_ptr, v_zero_ptr, base, start, channel, num_slots, dim, block, q.dtype,
                  v_bits, v_per_word, v_by_token, v_group, v_middle)  # fmt: skip
        p = _reordered(p, block, rows, k_per_word, v_per_word).to(q.dtype)
        acc = tl.dot(tl.trans(v), p, acc * keep[None, :], input_precision="tf32x3")  # [D, R]
    out = (head.to(tl.int64) * tl.num_programs(1) + split) * num_rows + row
    tl.store(acc_ptr + out[None, :] * dim + channel[:, None], acc, mask=exists)
    tl.store(top_ptr + out, top, mask=row < num_rows)
    tl.store(total_ptr + out, total, mask=row < num_rows)


@triton.jit
def _rows(
    codes_ptr, scale_ptr, zero_ptr, head, start, channel,
    num_slots: tl.constexpr, dim: tl.constexpr, block: tl.constexpr, dtype: tl.constexpr,
    bits: tl.constexpr, per_word: tl.constexpr, by_token: tl.constexpr, group: tl.constexpr, middle: tl.constexpr,
):  # fmt: skip
    """Decode a tile of keys or values, dtype[block, D], tokens in the order of `_tokens`."""
    words: tl.constexpr = block // per_word
    shape: tl.constexpr = (per_word, words, channel.shape[0])
    word = start // per_word + tl.arange(0, words)
    codes = _codes(codes_ptr, head, start, word, channel, num_slots, dim, block, bits, per_word)
    if by_token:
        slot = start + _tokens(block, per_word)
        num_groups: tl.constexpr = dim // group
        at = (head * num_slots + slot)[:, None] * num_groups + (channel // group)[None, :]
        mask = (slot < num_slots)[:, None] & (channel < dim)[None, :]
    else:
        at = (head * (num_slots // group) + word * per_word // group)[:, None] * dim + channel[None, :]
        mask = (word * per_word < num_slots)[:, None] & (channel < dim)[None, :]
    scale = tl.load(scale_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if middle >= 0:
        zero = -scale * middle
    else:
        zero = tl.load(zero_ptr + at, mask=mask, other=0.0).to(tl.float32)
    zero -= 128.0 * scale
    if by_token:
        scale, zero = tl.reshape(scale, shape), tl.reshape(zero, shape)
    else:
        scale, zero = scale[None], zero[None]
    return tl.reshape((codes * scale + zero).to(dtype), (block, channel.shape[0]))


@triton.jit
def _codes(
    ptr, head, start, word, channel,
    num_slots: tl.constexpr, dim: tl.constexpr, block: tl.constexpr, bits: tl.constexpr, per_word: tl.constexpr,
):  # fmt: skip
    """128 + codes of a tile, f32[per_word, words, D]."""
    exists = (word * per_word < num_slots)[:, None] & (channel < dim)[None, :]
    if bits == 8:
        at = (head * num_slots + word)[:, None] * dim + channel[None, :]
        codes = tl.load(ptr + at, mask=exists, other=0)[None].to(tl.uint32)
    else:
        ptr += head * (num_slots * bits // 32) * dim
        row = word // 2 * 3 + word % 2 if bits == 3 else word
        shift = (tl.arange(0, per_word) * (32 // per_word)).to(tl.uint32)[:, None, None]
        codes = tl.load(ptr + row[:, None] * dim + channel[None, :], mask=exists, other=0)[None] >> shift
        codes &= (1 << (32 // per_word)) - 1
        if bits == 3:
            high = tl.load(ptr + (word // 2 * 3 + 2)[:, None] * dim + channel[None, :], mask=exists, other=0)[None]
            shift = tl.arange(0, per_word)[:, None, None] + (word % 2 * 16)[None, :, None]
            codes |= (high >> shift.to(tl.uint32) & 1) << 2
    return ((codes << 16) | _MAGIC).to(tl.float32, bitcast=True) if bits < 8 else codes.to(tl.float32) + 128.0


@triton.jit
def _tokens(block: tl.constexpr, per_word: tl.constexpr):
    """The token of the tile at each place of our order: places of a word first, then words."""
    place = tl.arange(0, block)
    return place % (block // per_word) * per_word + place // (block // per_word)


@triton.jit
def _reordered(p, block: tl.constexpr, rows: tl.constexpr, old: tl.constexpr, new: tl.constexpr):
    """Bring the tokens of p [block, R] from the order of `old` tokens a word to that of `new`."""
    if old == new:
        return p
    p = tl.permute(tl.reshape(p, (old, block // old, rows)), (1, 0, 2))
    return tl.reshape(tl.permute(tl.reshape(p, (block // new, new, rows)), (1, 0, 2)), (block, rows))


@triton.jit
def _tanh(x):
    """Hyperbolic tangent from exponentials that cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
