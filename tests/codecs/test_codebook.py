"""Levels anywhere: the nearest is taken, rows are brought to their units, and what is stored is the scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from kvcomp_jax.codecs import Codebook
from kvcomp_jax.codecs.levels import nearest
from kvcomp_jax.types import Constant
from pallas_kernels.codebook_decode.rows import look_up
from pallas_kernels.packing import unpack
from tests.laws.parts import HEAD_DIM, decoded, encode, normal, uneven


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_nearest_level_is_taken_and_read_back(bits):
    levels = np.sort(np.random.default_rng(bits).normal(size=2**bits)).astype(np.float32)
    x = np.asarray(normal(1, 40, 7))
    codes = nearest(jnp.asarray(x), levels)
    np.testing.assert_array_equal(codes, np.abs(x[..., None] - levels).argmin(-1))
    np.testing.assert_array_equal(look_up(codes, levels), levels[np.asarray(codes)])


def test_ties_and_what_lies_outside():
    levels = np.array([-1, 0, 2, 4], np.float32)
    codes = nearest(jnp.array([-9.0, -0.5, 1.0, 3.0, 3.001, 9.0]), levels)
    np.testing.assert_array_equal(codes, [0, 0, 1, 2, 3, 3])


@pytest.mark.parametrize("normalise", ["rms", "range"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_brought_to_the_levels_units(normalise, dtype):
    x = normal(0, 2, 32, HEAD_DIM) * 3 + (5 if normalise == "range" else 0)
    codec = Codebook(levels=uneven(4), normalise=normalise, metadata_dtype=dtype)
    enc = encode(codec, x, None)
    wide = np.asarray(x, np.float64)
    if normalise == "rms":
        scale, zero = np.sqrt((wide**2).mean(-1)), 0 * wide[..., 0]
    else:
        scale, zero = (wide.max(-1) - wide.min(-1)) / 2, (wide.max(-1) + wide.min(-1)) / 2
    np.testing.assert_allclose(enc.scale, scale, rtol=1e-3 if dtype == "float16" else 1e-6)
    assert (enc.zero_point is None) == (normalise == "rms")
    if normalise == "range":
        np.testing.assert_allclose(enc.zero_point, zero, rtol=1e-3, atol=1e-3)
        error = np.abs(np.asarray(decoded(codec, enc, None)) - wide)
        half_gap = np.diff(uneven(4).value).max() / 2
        assert (error <= (half_gap + 5e-3) * scale[..., None] + 5e-3).all()  # and the metadata's rounding


def test_values_are_read_where_levels_choose():
    levels, values = uneven(3), Constant(np.arange(8, dtype=np.float32))
    codec = Codebook(levels=levels, values=values, normalise="none")
    x = normal(2, 1, 32, HEAD_DIM)
    enc = encode(codec, x, None)
    np.testing.assert_array_equal(decoded(codec, enc, None), unpack(enc.codes, 3).astype(jnp.float32))
    np.testing.assert_array_equal(unpack(enc.codes, 3), nearest(x, levels.value))


@pytest.mark.parametrize("normalise", ["rms", "range"])
def test_zeros_huge_and_tiny_rows_stay_finite(normalise):
    codec = Codebook(levels=uneven(4), normalise=normalise)
    for value in (0.0, 1e-30, 1e9, 3e38):
        x = jnp.full((1, 8, HEAD_DIM), value).at[..., ::2].set(-value)
        back = decoded(codec, encode(codec, x, None), None)
        assert bool(jnp.isfinite(back).all())
        if value < 1:
            np.testing.assert_allclose(back, 0.0, atol=1e-6)


def test_values_that_are_not_finite_are_an_error_under_checkify():
    codec = Codebook(levels=uneven(2), normalise="none")
    check = checkify.checkify(jax.jit(lambda x: codec.encode(x, None)))
    error, _ = check(jnp.zeros((16, 8)))
    error.throw()
    for bad in (jnp.nan, jnp.inf):
        error, _ = check(jnp.zeros((16, 8)).at[3, 3].set(bad))
        with pytest.raises(checkify.JaxRuntimeError, match="not finite; they have no codes"):
            error.throw()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"levels": np.arange(5.0)}, "must be a vector of"),
        ({"levels": np.array([0.0, 2.0, 1.0, 3.0])}, "must be finite and ascend"),
        ({"levels": np.arange(4.0), "values": np.arange(8.0)}, "must be as many as levels"),
        ({"levels": np.arange(4.0), "normalise": "max"}, "normalise='max' must be one of"),
    ],
)
def test_impossible_codebooks_are_refused(kwargs, words):
    kwargs = {k: Constant(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
    with pytest.raises(ValueError, match=words):
        Codebook(**kwargs)
