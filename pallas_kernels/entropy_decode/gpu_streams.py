"""Products with streams of prefix codes in Triton: a thread decodes its stream and multiplies each symbol at once."""

import triton
import triton.language as tl

from pallas_kernels.entropy_decode.gpu_logits import finish_logits, load_logits, queries, scales
from pallas_kernels.triton_attention import LEAST


@triton.jit
def dot_streams(
    q_ptr, words_ptr, ends_ptr, choice_ptr, table_ptr, scale_ptr, zero_ptr, length_ptr, pos_ptr, q_pos_ptr,
    logits_ptr, top_ptr,
    num_heads: tl.constexpr, num_rows: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, rows: tl.constexpr,
    slots_of_split: tl.constexpr, pos_heads: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr,
    block: tl.constexpr, scale_rows: tl.constexpr, scale_cols: tl.constexpr,
    num_words: tl.constexpr, num_streams: tl.constexpr, max_bits: tl.constexpr, num_tables: tl.constexpr,
    streams: tl.constexpr, pieces: tl.constexpr, size: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    """Logits f32[B, K, S, R] of a split's slots and their maximum, for streams along tokens; see `dot_planes`."""
    head, first = tl.program_id(0), tl.program_id(1) * slots_of_split
    base, stream = head.to(tl.int64), tl.arange(0, streams)
    exists, place = stream < num_streams, _place(stream, pieces, size)
    row, length, q_pos, pos_ptr = queries(length_ptr, pos_ptr, q_pos_ptr, head, num_heads, num_rows, num_slots, rows,
                                          pos_heads)  # fmt: skip
    top = tl.full((rows,), LEAST, tl.float32)
    for start in tl.range(first, tl.minimum(first + slots_of_split, length), block):
        at, words, table = _open(words_ptr, ends_ptr, choice_ptr, table_ptr, base, start, stream, exists,
                                 num_slots, block, num_words, num_streams, max_bits, num_tables)  # fmt: skip
        for j in tl.range(together):
            slot = start + stream // pieces * together + j
            scale, zero = scales(scale_ptr, zero_ptr, base, slot, place, exists, place < dim,
                                 num_slots, dim, scale_rows, scale_cols)  # fmt: skip
            logits = tl.zeros((streams, rows), tl.float32)
            for i in tl.range(size):
                at, code = _symbol(words, table, at, exists, num_words, max_bits)
                channel = place + i
                if scale_cols > 1:  # else a line has one scale
                    scale, zero = scales(scale_ptr, zero_ptr, base, slot, channel, exists, channel < dim,
                                         num_slots, dim, scale_rows, scale_cols)  # fmt: skip
                q = tl.load(q_ptr + (base * num_rows + row)[None, :] * dim + channel[:, None],
                            mask=(row < num_rows)[None, :], other=0.0).to(tl.float32)  # fmt: skip
                logits += (code * scale + zero)[:, None] * q
            logits = tl.sum(tl.reshape(logits, (streams // pieces, pieces, rows)), 1)
            token = tl.arange(0, streams // pieces) * together + j
            top = finish_logits(logits, top, logits_ptr, pos_ptr, base, start + token, token < block, row, length,
                                q_pos, num_rows, num_slots, pos_heads, soft_cap, sliding_window)  # fmt: skip
    out = (base * tl.num_programs(1) + tl.program_id(1)) * num_rows + row
    tl.store(top_ptr + out, top, mask=row < num_rows)


@triton.jit
def mix_streams(
    logits_ptr, top_ptr, words_ptr, ends_ptr, choice_ptr, table_ptr, scale_ptr, zero_ptr, length_ptr,
    acc_ptr, total_ptr,
    num_heads: tl.constexpr, num_rows: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, rows: tl.constexpr,
    slots_of_split: tl.constexpr,
    block: tl.constexpr, scale_rows: tl.constexpr, scale_cols: tl.constexpr,
    num_words: tl.constexpr, num_streams: tl.constexpr, max_bits: tl.constexpr, num_tables: tl.constexpr,
    streams: tl.constexpr, pieces: tl.constexpr, size: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    """Sums over a split's slots, for streams along channels; see `mix_planes`."""
    head, first = tl.program_id(0), tl.program_id(1) * slots_of_split
    base, row, stream = head.to(tl.int64), tl.program_id(2) * rows + tl.arange(0, rows), tl.arange(0, streams)
    exists, place = stream < num_streams, _place(stream, pieces, size)
    out = (base * tl.num_programs(1) + tl.program_id(1)) * num_rows + row
    top = tl.load(top_ptr + out, mask=row < num_rows, other=0.0)
    length = tl.minimum(tl.load(length_ptr + head // num_heads), num_slots)
    acc, total = (), tl.zeros((rows,), tl.float32)
    for _ in tl.static_range(together):
        acc = acc + (tl.zeros((streams, rows), tl.float32),)
    for start in tl.range(first, tl.minimum(first + slots_of_split, length), block):
        at, words, table = _open(words_ptr, ends_ptr, choice_ptr, table_ptr, base, start, stream, exists,
                                 num_slots, block, num_words, num_streams, max_bits, num_tables)  # fmt: skip
        old, acc = acc, ()
        for j in tl.static_range(together):
            channel, sums = stream // pieces * together + j, old[j]
            scale, zero = scales(scale_ptr, zero_ptr, base, start + place, channel, start + place < num_slots, exists,
                                 num_slots, dim, scale_rows, scale_cols)  # fmt: skip
            for i in tl.range(size):
                at, code = _symbol(words, table, at, exists, num_words, max_bits)
                slot = start + place + i
                if scale_rows > num_slots // block:  # else a line has one scale
                    scale, zero = scales(scale_ptr, zero_ptr, base, slot, channel, slot < num_slots, exists,
                                         num_slots, dim, scale_rows, scale_cols)  # fmt: skip
                logits = load_logits(logits_ptr, base, slot, slot < length, row, num_rows, num_slots)
                p = tl.exp(logits - top[None, :])
                sums += (code * scale + zero)[:, None] * p
                if j == 0:
                    total += tl.sum(p if pieces == 1 else tl.where((stream < pieces)[:, None], p, 0.0), 0)
            acc = acc + (sums,)
    for j in tl.static_range(together):
        sums = tl.sum(tl.reshape(acc[j], (streams // pieces, pieces, rows)), 1)
        channel = tl.arange(0, streams // pieces) * together + j
        mask = (channel < dim)[:, None] & (row < num_rows)[None, :]
        tl.store(acc_ptr + out[None, :] * dim + channel[:, None], sums, mask=mask)
    tl.store(total_ptr + out, total, mask=row < num_rows)


@triton.jit
def _place(stream, pieces: tl.constexpr, size: tl.constexpr):
    """Where in a line each stream begins; one for all, visibly, if lines are not cut."""
    if pieces == 1:
        return tl.zeros((1,), tl.int32)
    else:
        return stream % pieces * size


@triton.jit
def _open(
    words_ptr, ends_ptr, choice_ptr, table_ptr, head, start, stream, exists,
    num_slots: tl.constexpr, block: tl.constexpr, num_words: tl.constexpr, num_streams: tl.constexpr,
    max_bits: tl.constexpr, num_tables: tl.constexpr,
):  # fmt: skip
    """The bit at which each stream of the unit at slot `start` begins, the unit's words and its table."""
    unit = head * (num_slots // block) + start // block
    ends = tl.load(ends_ptr + unit * num_streams + stream, mask=exists, other=0).to(tl.int32)
    choice = tl.load(choice_ptr + unit).to(tl.int64)
    return (
        8 * (tl.cumsum(ends, 0) - ends),
        words_ptr + unit * num_words,
        table_ptr + ((head * num_tables + choice) << max_bits),
    )


@triton.jit
def _symbol(words, table, at, exists, num_words: tl.constexpr, max_bits: tl.constexpr):
    """The next symbol of each stream in float32, and the bits read after it."""
    word, shift = at // 32, (at % 32).to(tl.uint32)
    here = tl.load(words + tl.minimum(word, num_words - 1), mask=exists, other=0)
    after = tl.load(words + tl.minimum(word + 1, num_words - 1), mask=exists, other=0)
    bits = (here << shift) | ((after >> (31 - shift)) >> 1)
    entry = tl.load(table + (bits >> (32 - max_bits)).to(tl.int32), mask=exists, other=0).to(tl.int32)
    return at + (entry >> 8), (entry & 255).to(tl.float32)
