"""The 4-bit block formats, against a plain implementation of their definitions with ml_dtypes' casts."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.codecs import Float4
from pallas_kernels.packing import unpack
from tests.laws.parts import HEAD_DIM, decoded, encode, normal


def codec_of(text, head_dim=HEAD_DIM):
    return kvc.parse(text).spec(max_len=64, head_dim=head_dim).rungs[0].k


def to_fp4(x):
    return np.clip(x, -6, 6).astype(np.float32).astype(ml_dtypes.float4_e2m1fn)


def nvfp4(x, scale):
    """(block scales, quotients, numbers) as published: two divisions, casts to nearest even, saturating."""
    groups = x.reshape(*x.shape[:-1], -1, 16).astype(np.float64)
    ideal = np.abs(groups).max(-1) / 6 / scale
    block = np.minimum(ideal, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    width = block.astype(np.float64) * scale
    quotient = np.divide(groups, width[..., None], out=np.zeros_like(groups), where=width[..., None] > 0)
    return block, quotient, (to_fp4(quotient).astype(np.float64) * width[..., None]).reshape(x.shape)


def near_a_tie(quotient, shape):
    """Where a rounding error of the quotient may decide."""
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    return (np.abs(np.abs(quotient)[..., None] - middles).min(-1) < 1e-5).reshape(shape)


@pytest.mark.parametrize("scale", ["token", 1.0, 0.03125])
def test_nvfp4_is_the_published_rounding(scale):
    x = np.asarray(normal(0, 2, 32, HEAD_DIM)) * np.logspace(-1, 1, 32)[:, None].astype(np.float32)
    codec = codec_of(f"nvfp4:scale={scale}")
    enc = encode(codec, jnp.asarray(x), None)
    if scale == "token":
        np.testing.assert_allclose(enc.scale, np.abs(x).max(-1) / (6 * 448), rtol=1e-6)
        outer = np.asarray(enc.scale, np.float64)[..., None]
    else:
        outer = np.full((2, 32, 1), scale)
    block, quotient, numbers = nvfp4(x, outer)
    same = np.asarray(enc.block_scale) == block.view(np.uint8)
    assert same.mean() > 0.99  # ties of block scales may fall either way
    sure = np.repeat(same, 16, -1) & ~near_a_tie(quotient, x.shape)
    assert sure.mean() > 0.98
    codes = to_fp4(quotient).view(np.uint8).reshape(x.shape)
    np.testing.assert_array_equal(np.asarray(unpack(enc.codes, 4))[sure], codes[sure])
    np.testing.assert_allclose(np.asarray(decoded(codec, enc, None))[sure], numbers[sure], rtol=1e-6)


def test_the_largest_block_of_a_token_has_the_largest_scale():
    enc = codec_of("nvfp4").encode(normal(1, 32, HEAD_DIM), None)
    assert (np.asarray(enc.block_scale).max(-1) == 126).all()  # 448 in e4m3


def test_mxfp4_is_the_published_rounding():
    x = np.asarray(normal(2, 2, 32, HEAD_DIM)) * np.logspace(-6, 6, 32)[:, None].astype(np.float32)
    codec = codec_of("mxfp4")
    enc = encode(codec, jnp.asarray(x), None)
    groups = x.reshape(2, 32, -1, 32)
    power = np.floor(np.log2(np.abs(groups).max(-1).astype(np.float64))) - 2  # 2 is the exponent of 6 = 1.5 * 2**2
    np.testing.assert_array_equal(enc.block_scale, power + 127)
    numbers = to_fp4(groups / 2.0 ** power[..., None])
    np.testing.assert_array_equal(np.asarray(unpack(enc.codes, 4)), numbers.view(np.uint8).reshape(x.shape))
    back = numbers.astype(np.float32) * 2.0 ** power[..., None].astype(np.float32)
    np.testing.assert_array_equal(decoded(codec, enc, None), back.reshape(x.shape))


@pytest.mark.parametrize("text", ["nvfp4", "nvfp4:scale=1.0", "mxfp4"])
def test_every_number_and_every_midpoint_in_a_block(text):
    """A block with 6 (or 4) as its largest has scale 1: its numbers come back and midpoints go to even."""
    steps = np.arange(0, 6.01, 0.25, dtype=np.float32)
    x = np.zeros((8, 2, 32), np.float32)
    x[0, 0, : len(steps)], x[1, 0, : len(steps)] = steps, -steps
    x[:, 1] = x[:, 0]
    x[..., 0, -1] = x[..., 1, 15] = x[..., 0, 15] = x[..., 1, -1] = 6
    x = x.reshape(8, 64)
    codec = codec_of(text)
    back = decoded(codec, encode(codec, jnp.asarray(x), None), None)
    np.testing.assert_allclose(back, to_fp4(x).astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize("text", ["nvfp4", "nvfp4:scale=1.0", "mxfp4"])
def test_errors_are_at_most_half_a_gap(text):
    x = np.asarray(normal(3, 64, HEAD_DIM))
    codec = codec_of(text)
    back = np.asarray(decoded(codec, encode(codec, jnp.asarray(x), None), None))
    largest = np.repeat(np.abs(x.reshape(64, -1, codec.group_size)).max(-1), codec.group_size, -1)
    # Gaps are a third of the largest number at most; mxfp4 also cuts a quarter off what is just below the next power.
    assert (np.abs(back - x) <= largest * (0.25 if text == "mxfp4" else 1 / 6 * 1.07)).all()


@pytest.mark.parametrize("text", ["nvfp4", "nvfp4:scale=1.0", "mxfp4"])
def test_zeros_tiny_and_huge_rows_stay_finite(text):
    codec = codec_of(text)
    for value in (0.0, 1e-44, 1e-38, 1e-30, 1e30, 3e38):
        x = jnp.full((8, HEAD_DIM), value).at[:, ::2].mul(-1)
        back = decoded(codec, encode(codec, x, None), None)
        assert bool(jnp.isfinite(back).all())
        if value == 0:
            np.testing.assert_array_equal(back, 0)
        if value == 1e-30 and "scale" not in text:
            np.testing.assert_allclose(back, x, rtol=0.2)  # half the gap between 4 and 6


@pytest.mark.parametrize(
    ("text", "per_value"),
    [("nvfp4", 4.75), ("nvfp4:scale=1.0", 4.5), ("nvfp4:metadata_dtype=bfloat16", 4.625), ("mxfp4", 4.25)],
)
def test_bits_a_value(text, per_value):
    spec = kvc.parse(text).spec(max_len=512, head_dim=128)
    cache = jax.eval_shape(lambda: kvc.init(spec, batch=1, num_kv_heads=8, head_dim=128, dtype=jnp.bfloat16))
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.tiers[0].k, cache.tiers[0].v)))
    assert stored * 8 / (2 * 8 * 512 * 128) == per_value


@pytest.mark.parametrize(
    ("text", "head_dim", "words"),
    [
        ("nvfp4", 72, "group_size=16 must divide head_dim=72; .* use another codec"),
        ("mxfp4", 80, "group_size=32 must divide head_dim=80; .* use another codec"),
        ("nvfp4:block_size=12", 64, "block_size=12 must be a multiple of 8"),
        ("nvfp4:scale=-1.0", 64, "scale=-1.0 must be a positive float"),
    ],
)
def test_what_cannot_be_is_refused(text, head_dim, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=64, head_dim=head_dim)


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="block_scale='e5m2' must be one of e4m3, e8m0"):
        Float4(group_size=16, block_scale="e5m2")
    with pytest.raises(ValueError, match="scale='token' is for block_scale='e4m3'"):
        Float4(group_size=32, block_scale="e8m0", scale="token")
