"""Rows of codes of levels in Triton: a tile of slots and channels, and its rotation."""

import triton
import triton.language as tl

from pallas_kernels.rotary import COS, SIN, TURN
from pallas_kernels.triton_words import codes_in_order

_COS, _SIN, _TURN = tl.constexpr(COS), tl.constexpr(SIN), tl.constexpr(TURN)


@triton.jit
def load_levels(ptr, bits: tl.constexpr):
    """All levels, numbers in registers."""
    levels = ()
    for i in tl.static_range(1 << bits):
        levels = levels + (tl.load(ptr + i),)  # type: ignore[assignment]
    return levels


@triton.jit
def decode_tile(
    ptr, levels, scale_ptr, zero_ptr, outlier_ptr, index_ptr, unit_ptr, offset_ptr, head, start, channel, exists,
    tile: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr, joined: tl.constexpr,
    scaled: tl.constexpr, shifted: tl.constexpr, outliers: tl.constexpr, by_channel: tl.constexpr,
):  # fmt: skip
    """Rows of consecutive slots from `start` on, before they rotate: f32[tile, channels].

    Of `joined` heads each has its channels among those of the stored row. Channels that do not exist hold anything
    finite.
    """
    stored, shift = head // joined, (head % joined).to(tl.int32) * dim
    codes = codes_in_order(ptr, stored, start, shift + channel, exists, tile, num_slots, dim * joined, bits)
    x = _look_up(codes, levels, bits)
    at = stored * num_slots + tl.minimum(start + tl.arange(0, tile), num_slots - 1)
    if scaled:
        x = x * tl.load(scale_ptr + at).to(tl.float32)[:, None]
    if shifted:
        x = x + tl.load(zero_ptr + at).to(tl.float32)[:, None]
    for i in tl.range(outliers):  # a loop: unrolled, its loads take the registers
        index = tl.load(index_ptr + at * outliers + i).to(tl.int32) - shift
        value = tl.load(outlier_ptr + at * outliers + i).to(tl.float32)
        x += tl.where(index[:, None] == channel[None, :], value[:, None], 0.0)
    if by_channel % 2 == 1:
        x = x * tl.load(unit_ptr + head * dim + channel, mask=exists, other=0.0)[None, :]
    if by_channel >= 2:
        x = x + tl.load(offset_ptr + head * dim + channel, mask=exists, other=0.0)[None, :]
    return x


@triton.jit
def _look_up(codes, levels, bits: tl.constexpr):
    """levels[codes], f32: the candidates are halved with each bit of the code."""
    odd, left = (codes & 1) != 0, ()
    for i in tl.static_range(1 << (bits - 1)):
        left = left + (tl.where(odd, levels[2 * i + 1], levels[2 * i]),)  # type: ignore[assignment]
    for bit in tl.static_range(1, bits):
        before, left = left, ()
        odd = (codes >> bit & 1) != 0
        for i in tl.static_range(1 << (bits - 1 - bit)):
            left = left + (tl.where(odd, before[2 * i + 1], before[2 * i]),)  # type: ignore[assignment]
    return left[0]


@triton.jit
def turn_pairs(a, b, pos, frequency):
    """Rotate pairs of channels, [tile, pairs] each, by positions [tile] times frequencies [pairs].

    Cosines and sines as in `rotary.cos_sin`: those of CUDA's library fill the program with what large angles need.
    """
    angle = pos.to(tl.float32)[:, None] * frequency[None, :]
    turns = tl.floor(angle * (1 / 6.283185307179586) + 0.5)
    for i in tl.static_range(3):
        angle -= turns * _TURN[i]
    square = angle * angle
    cos, sin = tl.full(angle.shape, _COS[6], tl.float32), tl.full(angle.shape, _SIN[5], tl.float32)
    for i in tl.static_range(1, 7):
        cos = cos * square + _COS[6 - i]
    for i in tl.static_range(1, 6):
        sin = sin * square + _SIN[5 - i]
    sin *= angle
    return a * cos - b * sin, b * cos + a * sin
