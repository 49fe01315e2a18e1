"""The FP8 cache: ml_dtypes' numbers, saturation, scales, bytes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import checkify

import kvcomp_jax as kvc
from tests.laws.parts import HEAD_DIM, decoded, encode, normal

DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def codec_of(text, head_dim=HEAD_DIM):
    return kvc.parse(text).spec(max_len=64, head_dim=head_dim).rungs[0].k


@pytest.mark.parametrize("fmt", DTYPES)
def test_rows_are_the_formats_numbers(fmt):
    x = np.asarray(normal(0, 3, 16, HEAD_DIM)) * 20
    codec = codec_of(f"fp8:format={fmt}")
    enc = encode(codec, jnp.asarray(x), None)
    np.testing.assert_array_equal(enc.codes, x.astype(DTYPES[fmt]).view(np.uint8))
    np.testing.assert_array_equal(decoded(codec, enc, None), x.astype(DTYPES[fmt]).astype(np.float32))


@pytest.mark.parametrize("fmt", DTYPES)
def test_huge_values_saturate_and_a_scale_brings_them_back(fmt):
    x = jnp.asarray(normal(1, 8, HEAD_DIM)) * 10 * LARGEST[fmt]
    plain, scaled, each = (codec_of(f"fp8:format={fmt},scale={s}") for s in (1.0, 100.0, "token"))
    saturated = jnp.clip(x, -LARGEST[fmt], LARGEST[fmt])
    relative = 2.0 ** -(4 if fmt == "e4m3" else 3)  # half a unit in the last place
    np.testing.assert_allclose(decoded(plain, encode(plain, x, None), None), saturated, rtol=relative)
    for codec in (scaled, each):
        back = decoded(codec, encode(codec, x, None), None)
        np.testing.assert_allclose(back, x, rtol=relative * 1.01, atol=float(jnp.abs(x).max()) * 2.0**-9)


def test_a_scale_a_token_brings_its_largest_value_to_the_top():
    x = np.asarray(normal(2, 4, 16, HEAD_DIM)) * np.logspace(-4, 4, 16)[:, None].astype(np.float32)
    codec = codec_of("fp8:scale=token")
    enc = encode(codec, jnp.asarray(x), None)
    np.testing.assert_allclose(enc.scale, np.abs(x).max(-1) / 448, rtol=1e-6)
    assert (np.asarray(enc.codes & 127).max(-1) == 126).all()  # 448
    np.testing.assert_allclose(decoded(codec, enc, None), x, rtol=0.064, atol=0)


@pytest.mark.parametrize(
    ("options", "per_value"),
    [("", 8.0), ("format=e5m2,scale=0.5", 8.0), ("scale=token", 8.25), ("scale=token,metadata_dtype=float16", 8.125)],
)
def test_bits_a_value(options, per_value):
    spec = kvc.parse(f"fp8:{options}").spec(max_len=512, head_dim=128)
    cache = jax.eval_shape(lambda: kvc.init(spec, batch=1, num_kv_heads=8, head_dim=128, dtype=jnp.bfloat16))
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.tiers[0].k, cache.tiers[0].v)))
    assert stored * 8 / (2 * 8 * 512 * 128) == per_value


def test_zeros_stay_zeros():
    for text in ("fp8", "fp8:scale=token"):
        codec = codec_of(text)
        np.testing.assert_array_equal(decoded(codec, encode(codec, jnp.zeros((8, HEAD_DIM)), None), None), 0.0)


@pytest.mark.parametrize("text", ["fp8", "nvfp4", "mxfp4", "turboquant"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_values_that_are_not_finite_are_an_error_under_checkify(text, bad):
    codec = codec_of(text)
    encode = checkify.checkify(jax.jit(lambda x: codec.encode(x, None)))
    checkify.check_error(encode(jnp.ones((8, HEAD_DIM)))[0])
    with pytest.raises(checkify.JaxRuntimeError, match="not finite; they have no codes"):
        checkify.check_error(encode(jnp.ones((8, HEAD_DIM)).at[3, 3].set(bad))[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fp8:format=e3m4", "format='e3m4' must be one of e4m3, e5m2"),
        ("fp8:scale=0", "scale=0.0 must be a positive float"),
        ("fp8:scale=nan", "scale=nan must be a positive float"),
        ("fp8:scale=row", "scale='row' must be a positive float for all tokens, or 'token'"),
    ],
)
def test_what_cannot_be_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        codec_of(text)
