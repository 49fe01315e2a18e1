"""Quantisation to packed codes in Triton: x is read once, codes and metadata are written once.

Every rounding is the reference's: exact division, products never contracted with sums, ties to even.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_calls
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.packing import pack_unit
from pallas_kernels.quantize_pack.block_sizes import CHANNELS, TOKENS

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds a small float to an integer, ties to even


def quantize_pack(x: jax.Array, fmt: Format, *, interpret: bool = False) -> Quantized:
    """See `api.quantize_pack`."""
    kernel = _per_token if fmt.axis == "token" else _per_channel
    channels = min(CHANNELS, triton.next_power_of_2(x.shape[-1]))
    return encode(kernel, x, (), fmt, tokens=TOKENS, channels=channels, interpret=interpret)


def encode(
    kernel: triton.JITFunction,
    x: jax.Array,
    more: tuple[jax.Array, ...],
    fmt: Format,
    *,
    tokens: int,
    channels: int,
    interpret: bool,
    num_warps: int = 4,
    **constants: Any,
) -> Quantized:
    """Run a kernel that quantises what it makes of x.

    Args:
      kernel: Its parameters are x, `more`, codes, scale, zero_point, the constants below and the last ones here.
      tokens: That a program quantises per token, all channels wide; at least a word of them.
      channels: That a program quantises per channel, one group high.
    """
    *b, num_tokens, dim = x.shape
    rows, unit = x.size // (num_tokens * dim), pack_unit(fmt.bits)
    if fmt.axis == "channel" and fmt.group_size % unit:
        raise Unsupported(f"channel groups of {fmt.group_size} tokens cut words of {unit} tokens at {fmt.bits} bits.")
    grid: tuple[int, ...]
    if fmt.axis == "token":
        meta_shape, tokens = (*b, num_tokens, dim // fmt.group_size), max(tokens, unit)
        grid = (rows * triton.cdiv(num_tokens, tokens),)  # the only axis without a limit of 65535
        sizes = {"tokens": tokens, "groups": triton.next_power_of_2(dim // fmt.group_size)}
    else:
        meta_shape = (*b, num_tokens // fmt.group_size, dim)
        grid = (rows * (num_tokens // fmt.group_size), triton.cdiv(dim, channels))
        sizes = {"channels": channels}
    rows_of_codes, dtype = (num_tokens, jnp.uint8) if fmt.bits == 8 else (num_tokens * fmt.bits // 32, jnp.uint32)
    codes = jax.ShapeDtypeStruct((*b, rows_of_codes, dim), dtype)
    meta = jax.ShapeDtypeStruct(meta_shape, fmt.metadata_dtype)
    of_format = {
        "num_tokens": num_tokens,
        "dim": dim,
        "group_size": fmt.group_size,
        "group_padded": triton.next_power_of_2(fmt.group_size),
        "bits": fmt.bits,
        "num_levels": fmt.num_levels,
        "symmetric": fmt.symmetric,
        "clip": fmt.clip,
        "largest": float(jnp.finfo(fmt.metadata_dtype).max),
    }
    packed, scale, zero_point = triton_calls.call(
        kernel, (x, *more), (codes, meta, meta), grid, {**of_format, **sizes, **constants},
        interpret=interpret, num_warps=num_warps, fused_multiply_add=False,
    )  # fmt: skip
    return Quantized(packed, scale, None if fmt.symmetric else zero_point)


@triton.jit
def _per_token(
    x_ptr, codes_ptr, scale_ptr, zero_ptr,  # [N, S, D] [N, words, D] [N, S, D/g] [N, S, D/g]
    num_tokens: tl.constexpr, dim: tl.constexpr, group_size: tl.constexpr, group_padded: tl.constexpr,
    bits: tl.constexpr, num_levels: tl.constexpr, symmetric: tl.constexpr, clip: tl.constexpr, largest: tl.constexpr,
    tokens: tl.constexpr, groups: tl.constexpr,
):  # fmt: skip
    """Quantise all channels of some tokens of a row."""
    row = (tl.program_id(0) // tl.cdiv(num_tokens, tokens)).to(tl.int64)
    first = tl.program_id(0) % tl.cdiv(num_tokens, tokens) * tokens
    token = first + tl.arange(0, tokens)
    group, element = tl.arange(0, groups), tl.arange(0, group_padded)
    channel = group[:, None] * group_size + element[None, :]
    exists = (token < num_tokens)[:, None, None] & ((channel < dim) & (element < group_size)[None, :])[None]
    at = (row * num_tokens + token)[:, None, None] * dim + channel[None]
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)  # [T, D/g, g]
    encode_tokens(x, row, token, first, codes_ptr, scale_ptr, zero_ptr,
                  num_tokens, dim, group_size, bits, num_levels, symmetric, clip, largest)  # fmt: skip


@triton.jit
def encode_tokens(
    x, row, token, first, codes_ptr, scale_ptr, zero_ptr,
    num_tokens: tl.constexpr, dim: tl.constexpr, group_size: tl.constexpr,
    bits: tl.constexpr, num_levels: tl.constexpr, symmetric: tl.constexpr, clip: tl.constexpr, largest: tl.constexpr,
):  # fmt: skip
    """Quantise tokens f32[T, groups, channels], both padded to powers of two, of a row and write them."""
    tokens: tl.constexpr = x.shape[0]
    groups: tl.constexpr = x.shape[1]
    group_padded: tl.constexpr = x.shape[2]
    group, element = tl.arange(0, groups), tl.arange(0, group_padded)
    channel = group[:, None] * group_size + element[None, :]
    exists = ((channel < dim) & (element < group_size)[None, :])[None]
    scale, zero = _fit(x, exists, 2, num_levels, symmetric, clip, largest, scale_ptr.dtype.element_ty)
    codes = _encode(x, scale[:, :, None], zero[:, :, None], num_levels)
    meta_at = (row * num_tokens + token)[:, None] * (dim // group_size) + group[None, :]
    meta_exists = (token < num_tokens)[:, None] & (group * group_size < dim)[None, :]
    tl.store(scale_ptr + meta_at, scale.to(scale_ptr.dtype.element_ty), mask=meta_exists)
    if not symmetric:
        tl.store(zero_ptr + meta_at, zero.to(zero_ptr.dtype.element_ty), mask=meta_exists)
    codes = tl.reshape(codes, (tokens, groups * group_padded))
    channel = tl.reshape(tl.where((element < group_size)[None, :], channel, dim), (groups * group_padded,))
    codes_ptr += row * num_tokens * dim if bits == 8 else row * (num_tokens * bits // 32) * dim
    _store(codes_ptr, codes, first, num_tokens, channel, dim, bits)


@triton.jit
def _per_channel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr,  # [N, S, D] [N, words, D] [N, S/g, D] [N, S/g, D]
    num_tokens: tl.constexpr, dim: tl.constexpr, group_size: tl.constexpr, group_padded: tl.constexpr,
    bits: tl.constexpr, num_levels: tl.constexpr, symmetric: tl.constexpr, clip: tl.constexpr, largest: tl.constexpr,
    channels: tl.constexpr,
):  # fmt: skip
    """Quantise one group of tokens of some channels of a row."""
    row = (tl.program_id(0) // (num_tokens // group_size)).to(tl.int64)
    group = tl.program_id(0) % (num_tokens // group_size)
    channel = tl.program_id(1) * channels + tl.arange(0, channels)
    element = tl.arange(0, group_padded)
    exists = (element < group_size)[:, None] & (channel < dim)[None, :]
    at = (row * num_tokens + group * group_size + element)[:, None] * dim + channel[None, :]
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)  # [g, D]
    encode_channels(x, row, group, channel, codes_ptr, scale_ptr, zero_ptr,
                    num_tokens, dim, group_size, bits, num_levels, symmetric, clip, largest)  # fmt: skip


@triton.jit
def encode_channels(
    x, row, group, channel, codes_ptr, scale_ptr, zero_ptr,
    num_tokens: tl.constexpr, dim: tl.constexpr, group_size: tl.constexpr,
    bits: tl.constexpr, num_levels: tl.constexpr, symmetric: tl.constexpr, clip: tl.constexpr, largest: tl.constexpr,
):  # fmt: skip
    """Quantise one group of tokens f32[tokens padded, D] of a row and write it."""
    exists = (tl.arange(0, x.shape[0]) < group_size)[:, None] & (channel < dim)[None, :]
    scale, zero = _fit(x, exists, 0, num_levels, symmetric, clip, largest, scale_ptr.dtype.element_ty)
    codes = _encode(x, scale[None, :], zero[None, :], num_levels)
    meta_at = (row * (num_tokens // group_size) + group) * dim + channel
    tl.store(scale_ptr + meta_at, scale.to(scale_ptr.dtype.element_ty), mask=channel < dim)
    if not symmetric:
        tl.store(zero_ptr + meta_at, zero.to(zero_ptr.dtype.element_ty), mask=channel < dim)
    codes_ptr += row * num_tokens * dim if bits == 8 else row * (num_tokens * bits // 32) * dim
    _store(codes_ptr, codes, group * group_size, (group + 1) * group_size, channel, dim, bits)


@triton.jit
def _fit(
    x, exists, axis: tl.constexpr, num_levels: tl.constexpr, symmetric: tl.constexpr, clip: tl.constexpr,
    largest: tl.constexpr, dtype,
):  # fmt: skip
    """Scale and zero point along an axis, rounded to the stored dtype, in float32."""
    if symmetric:
        scale = _stored(tl.max(tl.abs(x), axis) * (clip / (num_levels // 2)), largest, dtype)
        return scale, -scale * (num_levels // 2)
    low = tl.min(tl.where(exists, x, float("inf")), axis)
    high = tl.max(tl.where(exists, x, float("-inf")), axis)
    return _stored((high - low) * (clip / (num_levels - 1)), largest, dtype), _stored(low * clip, largest, dtype)


@triton.jit
def _stored(x, largest: tl.constexpr, dtype):
    return tl.minimum(tl.maximum(x, -largest), largest).to(dtype).to(tl.float32)


@triton.jit
def _encode(x, scale, zero, num_levels: tl.constexpr):
    """Nearest code of each element, u32."""
    inverse = tl.where(scale > 0, tl.math.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)
    codes = tl.minimum(tl.maximum((x - zero) * inverse, 0.0), num_levels - 1.0)
    return ((codes + _ROUND) - _ROUND).to(tl.uint32)


@triton.jit
def _store(codes_ptr, codes, first, end, channel, dim: tl.constexpr, bits: tl.constexpr):
    """Pack codes [T, D] of tokens `first` up to `end`, as `packing.pack` does, and write them."""
    if bits == 8:
        token = first + tl.arange(0, codes.shape[0])
        mask = (token < end)[:, None] & (channel < dim)[None, :]
        tl.store(codes_ptr + token[:, None] * dim + channel[None, :], codes.to(tl.uint8), mask=mask)
    elif bits == 3:
        _store_plane(codes_ptr, codes & 3, first, end, channel, dim, 2, 2, 3)
        _store_plane(codes_ptr + 2 * dim, codes >> 2, first, end, channel, dim, 1, 1, 3)
    else:
        _store_plane(codes_ptr, codes, first, end, channel, dim, bits, 1, 1)


@triton.jit
def _store_plane(
    codes_ptr, codes, first, end, channel,
    dim: tl.constexpr, bits: tl.constexpr, words: tl.constexpr, words_of_unit: tl.constexpr,
):  # fmt: skip
    """Write the words of one plane, of which a unit of tokens has `words` next to each other."""
    per_word: tl.constexpr = 32 // bits
    num_words: tl.constexpr = codes.shape[0] // per_word
    shifts = (tl.arange(0, per_word) * bits).to(tl.uint32)
    packed = tl.reshape(codes, (num_words, per_word, codes.shape[1])) << shifts[None, :, None]
    packed = tl.sum(packed, 1)  # disjoint bits: the sum is an or
    word = first // per_word + tl.arange(0, num_words)
    at = (word // words * words_of_unit + word % words)[:, None] * dim + channel[None, :]
    tl.store(codes_ptr + at, packed, mask=(word * per_word < end)[:, None] & (channel < dim)[None, :])
