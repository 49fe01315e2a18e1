"""Packed rows inside Mosaic TPU kernels: half floats as integers, words as codes, and which axis lies along lanes.

XLA stores an array whose last axis is no multiple of 128 with the axis before it along lanes, so no lane is padded.
A kernel takes such rows transposed, which is then no copy, and turns words, not codes, by itself.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
_SIGNED = {2: (jnp.int2, 0xAAAAAAAA), 4: (jnp.int4, 0x88888888), 8: (jnp.int8, 0x80808080)}
_SMALLEST_NORMAL = 2.0**-14  # of float16


def tokens_along_lanes(dim: int) -> bool:
    """Whether XLA stores rows [*b, S, dim] with tokens along lanes."""
    return dim % LANES != 0


def repeat_lanes(x: jax.Array, width: int) -> jax.Array:
    """[R, 128] with equal lanes -> [R, width]."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]


def float_of_half(bits: jax.Array) -> jax.Array:
    """Bits of float16 in i32 (upper half ignored) -> the same numbers in f32; no infinities."""
    magnitude = (bits & 0x7FFF) << 13
    normal = lax.bitcast_convert_type(magnitude + (112 << 23), jnp.float32)
    subnormal = lax.bitcast_convert_type(magnitude + (113 << 23), jnp.float32) - _SMALLEST_NORMAL
    x = jnp.where(magnitude < (1 << 23), subnormal, normal)
    return jnp.where((bits & 0x8000) != 0, -x, x)


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


def metadata_value(x: jax.Array) -> jax.Array:
    """What `metadata_in` gave, read in a kernel -> f32."""
    return float_of_half(x.astype(jnp.int32)) if x.dtype == jnp.int16 else x.astype(jnp.float32)


def centred_codes(words: jax.Array, bits: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Words u32[n, D] of consecutive tokens -> codes - 2**(bits - 1), [n * 32 / bits, D]; bits are 2, 4 or 8.

    Flipping a code's highest bit makes it a signed integer, so that a word is a column of the machine's own small type.
    """
    small, flip = _SIGNED[bits]
    return pltpu.bitcast(words ^ jnp.uint32(flip), small).astype(dtype)


def words_of_three(ref, start, num_tokens: int, nibbles) -> jax.Array:
    """Units of 2 words of low bits and 1 of high bits, from row `start` of `ref` -> words of 4 bits a token.

    Args:
      ref: u32[rows, D]. start: A multiple of 3.
      nibbles: Scratch u32[num_tokens / 8, D], in which words fall into order.
    """
    units = num_tokens // 32
    low0, low1, high = (ref[pl.ds(start + i, units, stride=3), :] for i in range(3))
    for i, low in enumerate((low0, low0 >> 16, low1, low1 >> 16)):
        two = _spread(low & 0xFFFF, ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)))
        one = _spread((high >> (8 * i)) & 0xFF, ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)))
        nibbles[pl.ds(i, units, stride=4), :] = two | (one << 2)
    return nibbles[...]


def _spread(x: jax.Array, steps) -> jax.Array:
    """Move fields of bits apart, halving the distance each step."""
    for shift, mask in steps:
        x = (x | (x << shift)) & jnp.uint32(mask)
    return x
