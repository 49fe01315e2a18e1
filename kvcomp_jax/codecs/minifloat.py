"""Floats of eight bits and fewer: casts that round to nearest even and saturate, as their formats demand.

All are kept as the unsigned integers of their bits, sign first: every machine moves those. e4m3 and e5m2 are OCP's FP8
(Micikevicius et al. 2022, arXiv:2209.05433), largest 448 and 57344; e2m1 and the power of two e8m0 are those of OCP's
Microscaling Formats 1.0, 2023 (Rouhani et al. 2023, arXiv:2310.10537).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Float8Format = Literal["e4m3", "e5m2"]
FLOAT8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
E2M1_MAX = 6.0
_MANTISSA_BITS = {"e2m1": 1, "e4m3": 3, "e5m2": 2}
_BIAS = {"e2m1": 1, "e4m3": 7, "e5m2": 15}
_E2M1_MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def float8_max(fmt: Float8Format) -> float:
    """The largest number of the format."""
    return float(jnp.finfo(FLOAT8[fmt]).max)


def to_float8(x: jax.Array, fmt: Float8Format) -> jax.Array:
    """Round finite f32 to the nearest number of the format, the largest one beyond it: u8."""
    return lax.bitcast_convert_type(saturated(x, FLOAT8[fmt]), jnp.uint8)


def to_e2m1(x: jax.Array) -> jax.Array:
    """Round finite x to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with its sign, ties to the even code: u8 below 16."""
    size = jnp.abs(x)
    codes = jnp.where(jnp.signbit(x), jnp.uint8(8), jnp.uint8(0))
    for middle, tie_goes_up in _E2M1_MIDDLES:
        codes += ((size >= middle) if tie_goes_up else (size > middle)).astype(jnp.uint8)
    return codes


def from_minifloat(bits: jax.Array, fmt: Literal["e2m1", "e4m3", "e5m2"]) -> jax.Array:
    """Return the finite numbers that unsigned `bits` stand for, f32.

    Integer arithmetic on the bits of f32, which every machine has: a quarter faster on CPU than a cast.
    """
    mantissa_bits, bias = _MANTISSA_BITS[fmt], _BIAS[fmt]
    sign = 1 << (int(fmt[1]) + mantissa_bits)
    bits = bits.astype(jnp.uint32)
    size = bits & (sign - 1)
    normal = (size << (23 - mantissa_bits)) + jnp.uint32((127 - bias) << 23)
    subnormal = lax.bitcast_convert_type(size.astype(jnp.float32) * 2.0 ** (1 - bias - mantissa_bits), jnp.uint32)
    size = jnp.where(size < 2**mantissa_bits, subnormal, normal)
    return lax.bitcast_convert_type(size | ((bits & sign) * jnp.uint32(2**31 // sign)), jnp.float32)


def to_e8m0(x: jax.Array) -> jax.Array:
    """Round f32 >= 0 down to a power of two, exactly: u8, its exponent + 127, at least 1 since machines flush below."""
    exponent = lax.bitcast_convert_type(x, jnp.uint32) >> 23
    return jnp.maximum(exponent, 1).astype(jnp.uint8)


def from_e8m0(bits: jax.Array) -> jax.Array:
    """Return 2**(bits - 127) for u8 bits from 1 to 254, f32."""
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 23, jnp.float32)


def saturated(x: jax.Array, dtype: Any) -> jax.Array:
    """Cast to a float dtype; beyond its largest number is that number."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def inverse(x: jax.Array) -> jax.Array:
    """Return 1 / x, and 0 where x is 0."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)
