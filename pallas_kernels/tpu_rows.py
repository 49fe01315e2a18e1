"""Packed rows inside Mosaic TPU kernels: half floats as integers, words as codes, and which axis lies along lanes.

XLA stores an array whose last axis is no multiple of 128 with the axis before it along lanes, so no lane is padded.
A kernel takes such rows transposed, which is then no copy, and turns words, not codes, by itself.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format

LANES = 128
SUBLANES = 8
CODE_BIAS = {2: 4, 4: 16, 8: -128}  # see `biased_codes`
_SMALLEST_NORMAL = 2.0**-14  # of float16


def tokens_along_lanes(dim: int) -> bool:
    """Whether XLA stores rows [*b, S, dim] with tokens along lanes."""
    return dim % LANES != 0


def block_step(dim: int, fmt: Format | None) -> int:
    """Tokens at which rows of codes and of metadata are whole tiles of registers, whichever axis lies along lanes."""
    if fmt is None:  # dense
        return 2 * LANES
    along_lanes = tokens_along_lanes(dim)
    words = LANES * 32 // math.gcd(fmt.bits, 32) if along_lanes and fmt.bits < 8 else 2 * LANES
    return math.lcm(words, fmt.group_size * (LANES if along_lanes else 16) if fmt.axis == "channel" else 1)


def refuse_float16(*exact: jax.Array) -> None:
    """Raise Unsupported for exact rows in float16: metadata come as bits, rows would go to the matrix unit."""
    if any(x.dtype == jnp.float16 for x in exact):
        raise Unsupported("Mosaic has no float16 vectors; rows in bfloat16 or float32 are read.")


def repeat_lanes(x: jax.Array, width: int) -> jax.Array:
    """[R, 128] with equal lanes -> [R, width]."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]


def fold_lanes(x: jax.Array) -> jax.Array:
    """[R, T] -> [R, 128] with the same sum."""
    return sum((x[:, i : i + LANES] for i in range(LANES, x.shape[1], LANES)), start=x[:, :LANES])


def float_of_half(bits: jax.Array, *, positive: bool = False) -> jax.Array:
    """Bits of float16 in i32, whose upper half is ignored -> the same numbers in f32. Infinities are not known."""
    magnitude = (bits & 0x7FFF) << 13
    subnormal = lax.bitcast_convert_type(magnitude + (113 << 23), jnp.float32) - _SMALLEST_NORMAL
    normal = lax.bitcast_convert_type(magnitude + (112 << 23), jnp.float32)
    x = jnp.where(magnitude < (1 << 23), subnormal, normal)
    return x if positive else jnp.where((bits & 0x8000) != 0, -x, x)


def half_of_float(x: jax.Array) -> jax.Array:
    """f32 within float16's range -> its rounding to nearest even, as bits in i32."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13
    half = jnp.float32(0.5)  # its last place is float16's smallest number
    subnormal = lax.bitcast_convert_type(
        lax.bitcast_convert_type(magnitude, jnp.float32) + half, jnp.int32
    ) - lax.bitcast_convert_type(half, jnp.int32)
    return jnp.where(magnitude < (113 << 23), subnormal, normal) | ((bits >> 16) & 0x8000)


def metadata_in(x: jax.Array) -> jax.Array:
    """Scales or zero points as a kernel can read them: float16 as int16, which Mosaic has."""
    return lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.float16 else x


def metadata_out(x: jax.Array, dtype: str) -> jax.Array:
    """Undo `metadata_in` for what a kernel wrote."""
    return lax.bitcast_convert_type(x, jnp.float16) if dtype == "float16" else x


def metadata_value(x: jax.Array, *, positive: bool = False) -> jax.Array:
    """What `metadata_in` gave, read in a kernel -> f32."""
    return float_of_half(x.astype(jnp.int32), positive=positive) if x.dtype == jnp.int16 else x.astype(jnp.float32)


def biased_codes(words: jax.Array, bits: int) -> jax.Array:
    """Codes of consecutive tokens, plus `CODE_BIAS[bits]`: bf16[T, D] in the order of `tokens_of_lanes(_, 16 // bits)`.

    At 8 bits they are in order.

    Args:
      words: u32[n, D] of 128 tokens at 2 or 4 bits, or any number of tokens at 8.

    A code in the highest bits of bfloat16's mantissa adds to a power of two, so that two codes 16 bits apart become a
    pair of numbers in three instructions, where a conversion goes through int32 and float32. Bytes with their highest
    bit flipped are int8.
    """
    if bits == 8:
        return pltpu.bitcast(words ^ jnp.uint32(0x80808080), jnp.int8).astype(jnp.bfloat16)
    up, both = 7 - bits, jnp.uint32(0x00010001)
    mask, exponent = both * ((2**bits - 1) << up), both * ((127 + bits) << 7)
    shifted = [words << up - shift if shift < up else words >> shift - up for shift in range(0, 16, bits)]
    return jnp.concatenate([pltpu.bitcast((pair & mask) | exponent, jnp.bfloat16) for pair in shifted])


def int8_codes(words: jax.Array, bits: int) -> jax.Array:
    """Codes of consecutive tokens in the order of `tokens_of_lanes(_, 8 // bits)`, 128 taken off at 8 bits: i8[T, D].

    Args: as in `biased_codes`.
    """
    if bits == 8:
        return pltpu.bitcast(words ^ jnp.uint32(0x80808080), jnp.int8)
    mask = jnp.uint32(0x01010101 * (2**bits - 1))
    return jnp.concatenate([pltpu.bitcast((words >> shift) & mask, jnp.int8) for shift in range(0, 8, bits)])


def tokens_of_lanes(lane: jax.Array, places: int) -> jax.Array:
    """Which token of 128 stands at `lane` after codes were unpacked: place i of part n of the words comes at (i, n).

    A part, of 16 bits or 8, holds `places` codes; with one code a part tokens are in order.
    """
    if places == 1:
        return lane
    parts = LANES // places
    return (lane & -LANES) + (lane % parts) * places + (lane % LANES) // parts


def order_of(have: int, want: int) -> Callable[[jax.Array], jax.Array]:
    """Source lanes for `permute_lanes` that bring the order of `have` places into that of `want`."""

    def source(lane: jax.Array) -> jax.Array:
        token = tokens_of_lanes(lane, want)
        return (token % have) * (LANES // have) + token // have

    return source


def permute_lanes(x: jax.Array, source: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """x [R, T] with `x[:, source(lane)]` at each lane; `source` stays within 128 lanes."""
    rows = max(x.shape[0], 2)  # Mosaic gathers along lanes for more than one row
    index = source(lax.broadcasted_iota(jnp.int32, (rows, LANES), 1))
    parts = [jnp.broadcast_to(x[:, lanes], index.shape) for lanes in lane_slices(x.shape[1])]
    gathered = [jnp.take_along_axis(part, index, 1, mode="promise_in_bounds") for part in parts]
    return jnp.concatenate(gathered, 1)[: x.shape[0]]


def words_of_three(words: jax.Array, rows, nibbles) -> jax.Array:
    """Units of 2 words of low bits and 1 of high bits -> words of 4 bits a token.

    Args:
      words: u32[n * 3, D]. rows: Scratch u32[n * 3, min(D, 128)]. nibbles: Scratch u32[n * 4, min(D, 128)]. Words fall
        into order there: Mosaic has strides for refs of up to 128 lanes.
    """
    units, parts = words.shape[0] // 3, []
    for lanes in lane_slices(words.shape[1]):
        part = words[:, lanes]
        rows[:, : part.shape[1]] = part
        low0, low1, high = (rows[pl.ds(i, units, stride=3), :] for i in range(3))
        for i, low in enumerate((low0, low0 >> 16, low1, low1 >> 16)):
            two = _spread(low & 0xFFFF, ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)))
            one = _spread((high >> (8 * i)) & 0xFF, ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)))
            nibbles[pl.ds(i, units, stride=4), :] = two | (one << 2)
        parts.append(nibbles[:, : part.shape[1]])
    return jnp.concatenate(parts, 1)


def whole_lanes(width: int) -> int:
    """The next whole number of registers, in lanes."""
    return pl.cdiv(width, LANES) * LANES


def pick(registers: list[jax.Array], index: jax.Array, first: int = 0) -> jax.Array:
    """Elements `index` i32[n, 128] of rows of 32 bits that lie in registers [n, 128], the first of which is `first`.

    Mosaic picks lanes of one register by indices that differ in every place; a row of several registers is picked from
    one by one, and the right result is kept.
    """
    within = index & (LANES - 1)
    picked = [jnp.take_along_axis(x, within, 1, mode="promise_in_bounds") for x in registers]
    found, which = picked[0], index >> 7
    for i, x in enumerate(picked[1:], first + 1):
        found = jnp.where(which == i, x, found)
    return found


def lane_slices(dim: int) -> list[slice]:
    """Cut an axis along lanes into registers."""
    return [slice(first, min(first + LANES, dim)) for first in range(0, dim, LANES)]


def store_words(codes, words, bits: int) -> None:
    """Pack codes, a ref to u32[P, L <= 128], into `words`, a ref to u32[P * bits / 32, L], like `packing.pack`."""
    tokens = codes.shape[0]

    def word(low: int, plane: int, first: int, stride: int) -> jax.Array:
        """Bits low .. low + plane of the tokens of the words that begin at `first`, every `stride` tokens."""
        places = (
            ((codes[pl.ds(first + i, tokens // stride, stride=stride), :] >> low) & (2**plane - 1)) << (plane * i)
            for i in range(32 // plane)
        )
        return functools.reduce(jnp.bitwise_or, places)

    if bits != 3:
        words[...] = word(0, bits, 0, 32 // bits)
        return
    for row, (low, plane, first) in enumerate(((0, 2, 0), (0, 2, 16), (2, 1, 0))):
        words[pl.ds(row, tokens // 32, stride=3), :] = word(low, plane, first, 32)


def _spread(x: jax.Array, steps) -> jax.Array:
    """Move fields of bits apart, halving the distance each step."""
    for shift, mask in steps:
        x = (x | (x << shift)) & jnp.uint32(mask)
    return x
