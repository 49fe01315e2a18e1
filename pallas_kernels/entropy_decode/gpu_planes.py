"""Products with packs of bit planes in Triton: a unit is read as a tile and multiplied by the tensor cores."""

import triton
import triton.language as tl

from pallas_kernels.entropy_decode.gpu_logits import finish_logits, load_logits, queries, scales
from pallas_kernels.triton_attention import LEAST
from pallas_kernels.triton_products import precise_dot


@triton.jit
def dot_planes(
    q_ptr, planes_ptr, heads_ptr, scale_ptr, zero_ptr, length_ptr, pos_ptr, q_pos_ptr, logits_ptr, top_ptr,
    num_heads: tl.constexpr, num_rows: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, rows: tl.constexpr,
    slots_of_split: tl.constexpr, pos_heads: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr,
    block: tl.constexpr, scale_rows: tl.constexpr, scale_cols: tl.constexpr,
    pack: tl.constexpr, code_bits: tl.constexpr, width_bits: tl.constexpr, num_planes: tl.constexpr,
    rounds: tl.constexpr, channels: tl.constexpr, narrow: tl.constexpr,
):  # fmt: skip
    """Logits f32[B, K, S, R] of a split's slots and their maximum; slots that nobody sees get DEAD."""
    head, first = tl.program_id(0), tl.program_id(1) * slots_of_split
    base, channel = head.to(tl.int64), tl.arange(0, channels)
    row, length, q_pos, pos_ptr = queries(length_ptr, pos_ptr, q_pos_ptr, head, num_heads, num_rows, num_slots, rows,
                                          pos_heads)  # fmt: skip
    mask = (channel < dim)[:, None] & (row < num_rows)[None, :]
    q = tl.load(q_ptr + (base * num_rows + row)[None, :] * dim + channel[:, None], mask=mask, other=0.0)
    q = q.to(tl.bfloat16 if narrow else tl.float32)
    top = tl.full((rows,), LEAST, tl.float32)
    for start in tl.range(first, tl.minimum(first + slots_of_split, length), block):
        keys = _tile(planes_ptr, heads_ptr, scale_ptr, zero_ptr, base, start, num_slots, dim, block, scale_rows,
                     scale_cols, pack, code_bits, width_bits, num_planes, rounds, channels)  # fmt: skip
        logits = precise_dot(keys.to(q.dtype), q)  # [tokens, R]
        token = tl.arange(0, rounds * pack)
        top = finish_logits(logits, top, logits_ptr, pos_ptr, base, start + token, token < block, row, length, q_pos,
                            num_rows, num_slots, pos_heads, soft_cap, sliding_window)  # fmt: skip
    out = (base * tl.num_programs(1) + tl.program_id(1)) * num_rows + row
    tl.store(top_ptr + out, top, mask=row < num_rows)


@triton.jit
def mix_planes(
    logits_ptr, top_ptr, planes_ptr, heads_ptr, scale_ptr, zero_ptr, length_ptr, acc_ptr, total_ptr,
    num_heads: tl.constexpr, num_rows: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, rows: tl.constexpr,
    slots_of_split: tl.constexpr,
    block: tl.constexpr, scale_rows: tl.constexpr, scale_cols: tl.constexpr,
    pack: tl.constexpr, code_bits: tl.constexpr, width_bits: tl.constexpr, num_planes: tl.constexpr,
    rounds: tl.constexpr, channels: tl.constexpr, narrow: tl.constexpr,
):  # fmt: skip
    """Sum of probabilities times values over a split's slots, and of probabilities alone, relative to its maximum."""
    head, first = tl.program_id(0), tl.program_id(1) * slots_of_split
    base, row, token = head.to(tl.int64), tl.program_id(2) * rows + tl.arange(0, rows), tl.arange(0, rounds * pack)
    out = (base * tl.num_programs(1) + tl.program_id(1)) * num_rows + row
    top = tl.load(top_ptr + out, mask=row < num_rows, other=0.0)
    length = tl.minimum(tl.load(length_ptr + head // num_heads), num_slots)
    acc, total = tl.zeros((channels, rows), tl.float32), tl.zeros((rows,), tl.float32)
    for start in tl.range(first, tl.minimum(first + slots_of_split, length), block):
        values = _tile(planes_ptr, heads_ptr, scale_ptr, zero_ptr, base, start, num_slots, dim, block, scale_rows,
                       scale_cols, pack, code_bits, width_bits, num_planes, rounds, channels)  # fmt: skip
        p = tl.exp(load_logits(logits_ptr, base, start + token, (token < block) & (start + token < length), row,
                               num_rows, num_slots) - top[None, :])  # fmt: skip
        total += tl.sum(p, 0)
        if narrow:
            values, p = values.to(tl.bfloat16), p.to(tl.bfloat16)
        acc = precise_dot(tl.trans(values), p, acc)
    channel = tl.arange(0, channels)
    mask = (channel < dim)[:, None] & (row < num_rows)[None, :]
    tl.store(acc_ptr + out[None, :] * dim + channel[:, None], acc, mask=mask)
    tl.store(total_ptr + out, total, mask=row < num_rows)


@triton.jit
def _tile(
    planes_ptr, heads_ptr, scale_ptr, zero_ptr, head, start,
    num_slots: tl.constexpr, dim: tl.constexpr, block: tl.constexpr, scale_rows: tl.constexpr,
    scale_cols: tl.constexpr, pack: tl.constexpr, code_bits: tl.constexpr, width_bits: tl.constexpr,
    num_planes: tl.constexpr, rounds: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    """The values of the unit at slot `start`, f32[rounds * pack, channels]; 0 where there is no token or channel."""
    num_packs: tl.constexpr = block // pack * dim
    unit = head * (num_slots // block) + start // block
    turn, channel = tl.arange(0, rounds)[:, None], tl.arange(0, channels)[None, :]
    exists, number = (turn < block // pack) & (channel < dim), turn * dim + channel
    heads_ptr += unit * (num_packs // 8 * (code_bits + width_bits))
    low = _small_numbers(heads_ptr, number, exists, num_packs, code_bits)
    width = _small_numbers(heads_ptr + num_packs // 8 * code_bits, number, exists, num_packs, width_bits)
    flat = tl.reshape(width, (rounds * channels,))
    offset = tl.reshape(tl.cumsum(flat, 0) - flat, (rounds, channels))
    place = tl.arange(0, pack)[None, :, None].to(tl.uint32)
    codes = tl.broadcast_to(low[:, None, :], (rounds, pack, channels))
    for k in tl.static_range(code_bits):
        plane = tl.load(planes_ptr + unit * num_planes + offset + k, mask=exists & (k < width), other=0)
        codes += (((plane.to(tl.uint32)[:, None, :] >> place) & 1) << k).to(tl.int32)
    token = tl.arange(0, rounds * pack)
    scale, zero = scales(scale_ptr, zero_ptr, head, start + token[:, None], channel, (token < block)[:, None],
                         channel < dim, num_slots, dim, scale_rows, scale_cols)  # fmt: skip
    return tl.reshape(codes, (rounds * pack, channels)).to(tl.float32) * scale + zero


@triton.jit
def _small_numbers(ptr, number, exists, count: tl.constexpr, bits: tl.constexpr):
    """Numbers below 2**bits, i32 shaped like `number`: of all `count` of them bit by bit, eight a byte."""
    out = tl.zeros(number.shape, tl.int32)
    for k in tl.static_range(bits):
        byte = tl.load(ptr + k * (count // 8) + number // 8, mask=exists, other=0).to(tl.int32)
        out += ((byte >> (number % 8)) & 1) << k
    return out
