"""Small integers in machine words, packed along tokens.

A 32-bit word holds 32/b consecutive tokens of one channel, the first in the lowest bits: the layout that is cheapest
to unpack on TPU and unpacks without shuffles elsewhere. 3 bits are a plane of 2 and a plane of 1, so that they occupy
exactly 3; 8 bits are plain bytes.
"""

from functools import reduce

import jax
import jax.numpy as jnp

BITS = (2, 3, 4, 8)
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}  # signs are packed at 1 bit; no kernel quantises to it


def pack_unit(bits: int) -> int:
    """Tokens that share words: 32 at 1 bit, 16 at 2, 32 at 3, 8 at 4, 1 at 8."""
    return 1 if bits == 8 else 32 // min(_PLANES[bits])


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Pack codes u8[*b, S, D] below 2**bits into u32[*b, S * bits // 32, D]; 8 bits stay u8[*b, S, D].

    3 bits pack 32 tokens at a time, so that packed units concatenate: 2 words of the low bits, 1 of the high.
    """
    if bits == 8:
        return codes.astype(jnp.uint8)
    *b, num_tokens, dim = codes.shape
    unit = pack_unit(bits)
    codes = codes.reshape(*b, num_tokens // unit, unit, dim).astype(jnp.uint32)
    words, low = [], 0
    for plane in _PLANES[bits]:
        words.append(_pack_plane((codes >> low) & jnp.uint32(2**plane - 1), plane))
        low += plane
    return jnp.concatenate(words, -2).reshape(*b, num_tokens * bits // 32, dim)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """Undo `pack`: u32[*b, S * bits // 32, D] -> u32[*b, S, D] (bytes for 8 bits)."""
    if bits == 8:
        return words
    *b, rows, dim = words.shape
    unit = pack_unit(bits)
    words = words.reshape(*b, rows * 32 // (bits * unit), unit * bits // 32, dim)
    parts, low, row = [], 0, 0
    for plane in _PLANES[bits]:
        num_words = unit * plane // 32
        parts.append(_unpack_plane(words[..., row : row + num_words, :], plane) << low)
        low, row = low + plane, row + num_words
    return reduce(jnp.bitwise_or, parts).reshape(*b, rows * 32 // bits, dim)


def _pack_plane(codes: jax.Array, bits: int) -> jax.Array:
    """[..., n * 32/bits, D] -> [..., n, D]."""
    per_word = 32 // bits
    codes = codes.reshape(*codes.shape[:-2], codes.shape[-2] // per_word, per_word, codes.shape[-1])
    return (codes << _shifts(bits, codes.ndim)).sum(-2, dtype=jnp.uint32)  # disjoint bits: the sum is an or


def _unpack_plane(words: jax.Array, bits: int) -> jax.Array:
    """[..., n, D] -> [..., n * 32/bits, D]."""
    codes = (words[..., None, :] >> _shifts(bits, words.ndim + 1)) & jnp.uint32(2**bits - 1)
    return codes.reshape(*words.shape[:-2], words.shape[-2] * 32 // bits, words.shape[-1])


def _shifts(bits: int, rank: int) -> jax.Array:
    """Shift of each token in its word, along the last axis but one of an array of `rank`."""
    shifts = jnp.arange(32 // bits, dtype=jnp.uint32) * jnp.uint32(bits)
    return shifts.reshape(*(1,) * (rank - 2), -1, 1)
