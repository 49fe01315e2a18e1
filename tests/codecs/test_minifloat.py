"""Small floats against ml_dtypes: every code, every midpoint, its neighbours, and what lies beyond."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kvcomp_jax.codecs.minifloat import from_e8m0, from_minifloat, to_e2m1, to_e8m0, to_float8

FORMATS = {
    "e2m1": (ml_dtypes.float4_e2m1fn, 16),
    "e4m3": (ml_dtypes.float8_e4m3fn, 256),
    "e5m2": (ml_dtypes.float8_e5m2, 256),
}


def numbers(fmt):
    """(codes, f32 numbers) of all that are finite."""
    dtype, count = FORMATS[fmt]
    codes = np.arange(count, dtype=np.uint8)
    values = codes.view(dtype).astype(np.float32)
    finite = np.isfinite(values)
    return codes[finite], values[finite]


def to_bits(x, fmt):
    x = jnp.asarray(x)
    return np.asarray(jax.jit(to_e2m1)(x) if fmt == "e2m1" else jax.jit(to_float8, static_argnums=1)(x, fmt))


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_code_stands_for_its_number_and_comes_back(fmt):
    codes, values = numbers(fmt)
    got = np.asarray(jax.jit(from_minifloat, static_argnums=1)(jnp.asarray(codes), fmt))
    np.testing.assert_array_equal(got, values)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(values))
    np.testing.assert_array_equal(to_bits(values, fmt), codes)


@pytest.mark.parametrize("fmt", FORMATS)
def test_midpoints_go_to_even_and_their_neighbours_to_the_nearer(fmt):
    dtype, _ = FORMATS[fmt]
    values = np.unique(numbers(fmt)[1])
    middles = (values[1:] + values[:-1]) / 2  # exact in f32
    for x in (middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf))):
        np.testing.assert_array_equal(to_bits(x, fmt), x.astype(dtype).view(np.uint8))
    x = np.random.default_rng(0).normal(size=4000).astype(np.float32) * values[-1] / 3
    x = np.clip(x, values[0], values[-1])
    np.testing.assert_array_equal(to_bits(x, fmt), x.astype(dtype).view(np.uint8))


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_lies_beyond_the_largest_number_becomes_it(fmt):
    top = numbers(fmt)[1].max()
    x = np.array([1.0001, 1.06, 1.5, 1e4, 1e30], np.float32) * top
    for sign in (1, -1):
        back = from_minifloat(jnp.asarray(to_bits(sign * x, fmt)), fmt)
        np.testing.assert_array_equal(back, np.full(5, sign * top))


def test_powers_of_two_round_down_and_never_below_the_normal_ones():
    x = np.array([1, 1.99, 2, 3.99, 0.5, 0.4999, 2.0**-126, 2.0**-127, 0, 3e38], np.float32)
    bits = jax.jit(to_e8m0)(jnp.asarray(x))
    np.testing.assert_array_equal(bits, [127, 127, 128, 128, 126, 125, 1, 1, 1, 254])
    stood_for = np.asarray(bits).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(from_e8m0(bits), stood_for)
