"""Products with rows of K or V in Triton, dense or packed, place by place: what attention kernels share.

Rows are worked on in units of `places` slots, one place of all units at a time, so that unpacking a word is a shift
that keeps every element where the tensor cores want it. Products are [units, D] x [D, R] and [D, units] x [units, R]:
slots and channels fill the long side, the few queries the short one.

Scales per channel multiply codes before they are rounded to the type of q; scales per token fold into logits and
probabilities, channels being cut into their groups, and codes enter the products as they are.
"""

import triton
import triton.language as tl

from pallas_kernels.formats import Format
from pallas_kernels.triton_products import precise_dot
from pallas_kernels.triton_words import bias_of, biased_codes, load_words, per_word, scaled_codes


def constants(name: str, fmt: Format | None, dim: int, width: int, cuts: int = 1) -> dict:
    """What the kernel must know of rows; None is dense.

    Channels are worked on in `passes` passes over `cut` cuts of `part` channels, `stride` apart and under one scale
    per token each: `width` channels at a time, whatever `dim`, bound the registers a tile takes. `cuts` or more, if
    channels have no groups: warps that have none of their own all do the same.
    """
    by_token = fmt is not None and fmt.axis == "token"
    group = fmt.group_size if fmt is not None and by_token else triton.next_power_of_2(dim)
    whole = group < 16 or group & (group - 1)  # a group that cannot be cut
    stride = group if whole else min(group, width // cuts)
    part = max(16, triton.next_power_of_2(stride))
    cut = min(max(1, width // part), triton.next_power_of_2(triton.cdiv(dim, stride)))
    return {
        f"{name}_dim": dim,
        f"{name}_bits": 16 if fmt is None else fmt.bits,
        f"{name}_by_token": by_token,
        f"{name}_group": 1 if fmt is None else fmt.group_size,
        f"{name}_middle": fmt.num_levels // 2 if fmt is not None and fmt.symmetric else -1,
        f"{name}_passes": triton.cdiv(dim, stride * cut),
        f"{name}_cut": cut,
        f"{name}_part": part,
        f"{name}_stride": stride,
    }


@triton.jit
def channels(part_index: tl.constexpr, dim: tl.constexpr, cut: tl.constexpr, part: tl.constexpr, stride: tl.constexpr):
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
def dot_keys(
    logits, q, part_index: tl.constexpr, ptr, scale_ptr, zero_ptr, head, unit, places: tl.constexpr,
    num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr, by_token: tl.constexpr, group: tl.constexpr,
    middle: tl.constexpr, cut: tl.constexpr, part: tl.constexpr, stride: tl.constexpr,
):  # fmt: skip
    """Add a pass's share of the logits f32[words, R] of each place: q [cut, part, R] times keys."""
    channel, exists = channels(part_index, dim, cut, part, stride)
    channel, exists = channel[:, None, :], exists[:, None, :]
    bias: tl.constexpr = bias_of(bits, q.dtype)
    q_sum = tl.sum(q.to(tl.float32), 1)[:, None, :]
    out = ()
    for place in tl.static_range(places):
        if place % per_word(bits) == 0:
            low, high = load_words(ptr, head, unit[None, :, None], place, places, channel, exists, num_slots, dim, bits)
        if bits > 8:
            x = precise_dot(low.to(q.dtype), q)
        elif by_token:
            if place % 4 == 0:
                scales, zeros = _of_tokens(scale_ptr, zero_ptr, head, unit, place, places, part_index,
                                           num_slots, dim, group, middle, cut, stride)  # fmt: skip
            scale, zero = _pair(scales, zeros, place % 4, middle)
            x = precise_dot(biased_codes(low, high, bits, place, q.dtype), q)
            x = x * scale + q_sum * (zero - bias * scale)
        elif bits == 8:  # finer than 16-bit floats: rounded once, as a whole
            scale, zero = _of_channels(scale_ptr, zero_ptr, head, unit[None, :, None], place, places, channel, exists,
                                       num_slots, dim, group, middle)  # fmt: skip
            codes = biased_codes(low, high, bits, place, q.dtype).to(tl.float32) * scale + zero
            x = precise_dot(codes.to(q.dtype), q)
        else:
            if place % per_word(bits) == 0:
                scale, zero = _of_channels(scale_ptr, zero_ptr, head, unit[None, :, None], place, places, channel,
                                           exists, num_slots, dim, group, middle)  # fmt: skip
                factor = tl.broadcast_to(scale.to(q.dtype), low.shape)
                zero_logits = precise_dot(zero.to(q.dtype), q)
            if bias > 0:
                codes = scaled_codes(low, high, factor, factor * -bias, bits, place)
            else:
                codes = biased_codes(low, high, bits, place, q.dtype).to(q.dtype) * factor
            x = precise_dot(codes, q, zero_logits)
        out = out + (logits[place] + tl.sum(x, 0),)
    return out


@triton.jit
def add_values(
    acc, shift, seen, p, part_index: tl.constexpr, ptr, scale_ptr, zero_ptr, head, unit, places: tl.constexpr,
    dtype: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr, by_token: tl.constexpr,
    group: tl.constexpr, middle: tl.constexpr, cut: tl.constexpr, part: tl.constexpr, stride: tl.constexpr,
):  # fmt: skip
    """Add each place's p f32[words, R] times a pass's channels of the values to acc [cut, part, R]."""
    channel, exists = channels(part_index, dim, cut, part, stride)
    channel, exists = channel[:, :, None], exists[:, :, None]
    for place in tl.static_range(places):
        if place % per_word(bits) == 0:
            low, high = load_words(ptr, head, unit[None, None, :], place, places, channel, exists, num_slots, dim, bits)
        if bits > 8:
            scaled, codes = p[place][None].to(dtype), low.to(dtype)
        elif by_token:
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
            codes = (biased_codes(low, high, bits, place, tl.float32).to(tl.float32) * scale + zero).to(dtype)
        acc = precise_dot(codes, scaled, acc)
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
        slot = tl.minimum((unit * places + place)[:, None, None, None], num_slots - 4) + near
        at = (head * num_slots + slot)[None] * (dim // group) + index[:, :, :, None, None]
        scales = quarters(tl.load(scale_ptr + at, mask=exists[:, :, :, None, None], other=0))
        zeros = quarters(tl.load(zero_ptr + at, mask=exists[:, :, :, None, None], other=0)) if middle < 0 else scales
    return scales, zeros


@triton.jit
def quarters(x):
    """[*b, 2, 2] -> four [*b], in order."""
    even, odd = tl.split(x)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _pair(scales, zeros, index: tl.constexpr, middle: tl.constexpr):
    """A scale and its zero point in float32; symmetric formats have theirs at the middle code."""
    scale = scales[index].to(tl.float32)
    if middle >= 0:
        return scale, -scale * middle
    else:
        return scale, zeros[index].to(tl.float32)
