"""Prefix codes in streams: written by a scatter, decoded one symbol a step in all streams at once.

Each step looks at the next `max_bits` bits of every stream and finds symbol and length in a table. What a step decodes
is multiplied at once; nothing decoded is kept.
Source: one short stream a thread, decoded and multiplied in registers: KVComp, arXiv:2509.00579.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.entropy_decode.canonical import code_starts, look_up_table
from pallas_kernels.entropy_decode.formats import StreamFormat, Streams


def with_plain(lengths: jax.Array, fmt: StreamFormat) -> jax.Array:
    """Append plain packing, all codes of `plain_bits`, to tables u8[*b, J, n]: u8[*b, J + 1, n].

    Codes beyond 2**plain_bits have none there; units that use it do not hold them.
    """
    plain = jnp.full_like(lengths[..., :1, :], fmt.plain_bits)
    return jnp.concatenate([lengths, plain], -2)


def stream_bytes(codes: jax.Array, lengths: jax.Array, fmt: StreamFormat) -> jax.Array:
    """Bytes of each stream, i32[*b, units, T], for codes u8[*b, S, D] under one table u8[*b, n] each."""
    symbols = to_streams(codes, fmt)
    table = lengths.reshape(*lengths.shape[:-1], 1, -1)
    return (_per_unit(table, symbols).sum(-1) + 7) // 8


def write(
    codes: jax.Array, lengths: jax.Array, choice: jax.Array, num_words: int, fmt: StreamFormat
) -> tuple[jax.Array, jax.Array]:
    """Return words u32[*b, units, W] and ends u8[*b, units, T] of codes u8[*b, S, D].

    Args:
      lengths: u8[*b, J, n], all tables, see `with_plain`. choice: u8[*b, units], which one each unit uses; it must fit.
      num_words: W, words of a unit's slot.
    """
    symbols = to_streams(codes, fmt)  # [*b, units, T, L]
    starts = code_starts(lengths, fmt.max_bits)
    which = choice.astype(jnp.int32)[..., None]
    bits = _per_unit(jnp.take_along_axis(lengths, which, -2), symbols)
    code = _per_unit(jnp.take_along_axis(starts, which, -2), symbols)
    done = jnp.cumsum(bits, -1)
    ends = (done[..., -1] + 7) // 8
    at = 8 * (jnp.cumsum(ends, -1) - ends)[..., None] + done - bits
    high = code.astype(jnp.uint32) << (32 - fmt.max_bits)
    shift = (at % 32).astype(jnp.uint32)
    parts = high >> shift, (high << (31 - shift)) << 1  # a shift by 32 is undefined
    place = jnp.stack([at // 32, at // 32 + 1], -1).reshape(-1, 2 * fmt.block * fmt.head_dim)
    bits_set = jnp.stack(parts, -1).reshape(place.shape)
    words = jnp.zeros((place.shape[0], num_words), jnp.uint32)
    words = words.at[jnp.arange(place.shape[0])[:, None], place].add(
        bits_set, mode="drop"
    )  # disjoint: the sum is an or
    return words.reshape(*choice.shape, num_words), ends.astype(jnp.uint8)


def read(enc: Streams, lengths: jax.Array, fmt: StreamFormat) -> jax.Array:
    """Undo `write`: codes u8[*b, S, D]."""
    start, step = _reader(enc, lengths, fmt)
    symbols = lax.scan(lambda at, _: step(at), start, None, fmt.stream)[1]  # [L, *b, units, T]
    return _from_streams(jnp.moveaxis(symbols, 0, -1).astype(jnp.uint8), fmt)


def along_lines(a: jax.Array, enc: Streams, lengths: jax.Array, fmt: StreamFormat) -> jax.Array:
    """Sum over a line of a * codes: f32[*b, R, units, num_lines] for a f32[*b, R, units or 1, line]."""
    start, step = _reader(enc, lengths, fmt)
    pieces, size = fmt.pieces, fmt.line // fmt.pieces
    a = a.reshape(*a.shape[:-1], 1, pieces, size)  # [*b, R, units, 1, pieces, size]

    def one_line(at: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        def symbol(c: jax.Array, state: tuple) -> tuple:
            at, acc = state
            at, codes = step(at)
            weight = lax.dynamic_index_in_dim(a, c, a.ndim - 1, keepdims=False)
            return at, acc + weight * _split(codes, fmt)

        at, acc = lax.fori_loop(0, size, symbol, (at, _zeros(a.shape[:-4], enc, fmt)))
        return at, acc.sum(-1)

    lines = lax.scan(one_line, start, None, fmt.lines_together)[1]  # [together, *b, R, units, streams]
    lines = jnp.moveaxis(lines, 0, -1)
    return lines.reshape(*lines.shape[:-2], fmt.num_lines)


def across_lines(a: jax.Array, enc: Streams, lengths: jax.Array, fmt: StreamFormat) -> jax.Array:
    """Sum over the lines of a unit of a * codes: f32[*b, R, units, line] for a f32[*b, R, units, num_lines]."""
    start, step = _reader(enc, lengths, fmt)
    together, size = fmt.lines_together, fmt.line // fmt.pieces
    a = a.reshape(*a.shape[:-1], fmt.num_lines // together, 1, together)  # [*b, R, units, streams, 1, together]

    def one_line(j: jax.Array, state: tuple) -> tuple:
        at, total = state
        weight = lax.dynamic_index_in_dim(a, j, a.ndim - 1, keepdims=False)

        def symbol(at: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            at, codes = step(at)
            return at, (weight * _split(codes, fmt)).sum(-2)

        at, sums = lax.scan(symbol, at, None, size)  # [size, *b, R, units, pieces]
        return at, total + sums

    total = jnp.zeros((size, *a.shape[:-3], fmt.pieces))
    total = jnp.moveaxis(lax.fori_loop(0, together, one_line, (start, total))[1], 0, -1)
    return total.reshape(*total.shape[:-2], fmt.line)


def to_streams(codes: jax.Array, fmt: StreamFormat) -> jax.Array:
    """[*b, S, D] -> [*b, units, T, L]."""
    *b, num_tokens, _ = codes.shape
    units = codes.reshape(*b, num_tokens // fmt.block, fmt.block, fmt.head_dim)
    units = units if fmt.along == "token" else units.swapaxes(-1, -2)
    return units.reshape(*units.shape[:-2], fmt.num_streams, fmt.stream)


def _from_streams(symbols: jax.Array, fmt: StreamFormat) -> jax.Array:
    """[*b, units, T, L] -> [*b, S, D]."""
    units = symbols.reshape(*symbols.shape[:-2], fmt.num_lines, fmt.line)
    units = units if fmt.along == "token" else units.swapaxes(-1, -2)
    return units.reshape(*units.shape[:-3], -1, fmt.head_dim)


def _per_unit(table: jax.Array, symbols: jax.Array) -> jax.Array:
    """Look symbols u8[*b, units, T, L] up in a table [*b, units or 1, n] of their unit: i32 of their shape."""
    table = jnp.broadcast_to(table, (*symbols.shape[:-2], table.shape[-1])).astype(jnp.int32)
    flat = symbols.reshape(*symbols.shape[:-2], -1).astype(jnp.int32)
    return jnp.take_along_axis(table, flat, -1).reshape(symbols.shape)


def _reader(enc: Streams, lengths: jax.Array, fmt: StreamFormat) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """Where streams begin, and a step: bits read i32[*b, units, T] -> (bits read, symbols f32 of that shape)."""
    ends = enc.ends.astype(jnp.int32)
    start = 8 * (jnp.cumsum(ends, -1) - ends)
    num_words = enc.words.shape[-1]
    units = jnp.arange(enc.choice.size, dtype=jnp.int32).reshape(*enc.choice.shape, 1)
    words = enc.words.reshape(-1)
    tables = look_up_table(lengths, fmt.max_bits)  # [*b, J, 2**max_bits]
    heads = units[..., :1, :] // enc.choice.shape[-1]
    table_at = (heads * lengths.shape[-2] + enc.choice.astype(jnp.int32)[..., None]) << fmt.max_bits
    tables = tables.reshape(-1)

    def step(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        word, shift = at // 32, (at % 32).astype(jnp.uint32)
        here = words.at[units * num_words + jnp.minimum(word, num_words - 1)].get(mode="promise_in_bounds")
        after = words.at[units * num_words + jnp.minimum(word + 1, num_words - 1)].get(mode="promise_in_bounds")
        bits = (here << shift) | ((after >> (31 - shift)) >> 1)
        entry = tables.at[table_at + (bits >> (32 - fmt.max_bits)).astype(jnp.int32)].get(mode="promise_in_bounds")
        return at + (entry >> 8).astype(jnp.int32), (entry & 255).astype(jnp.float32)

    return start, step


def _split(codes: jax.Array, fmt: StreamFormat) -> jax.Array:
    """[*b, units, T] -> [*b, 1, units, streams, pieces], for products with [*b, R, units, ...]."""
    codes = codes.reshape(*codes.shape[:-1], -1, fmt.pieces)
    return jnp.expand_dims(codes, -4)


def _zeros(rows: tuple[int, ...], enc: Streams, fmt: StreamFormat) -> jax.Array:
    """Accumulator [*b, R, units, streams, pieces]; `rows` is [*b, R]."""
    return jnp.zeros((*rows, enc.choice.shape[-1], fmt.num_streams // fmt.pieces, fmt.pieces))
