"""Faithfulness of KIVI: the released quantiser's codes, residuals and bytes."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.codecs import Affine
from pallas_kernels.packing import unpack
from tests.laws.parts import HEAD_DIM, close_prompt, decode_many, make, prefill, qkv

GOLDEN = Path(__file__).parents[1] / "golden" / "methods" / "kivi_quantizer.npz"


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("which", "axis"), [("k", "channel"), ("v", "token")])
def test_codes_of_the_released_quantiser(which, axis, bits, group_size):
    golden = np.load(GOLDEN)
    codec = Affine(bits=bits, axis=axis, group_size=group_size, metadata_dtype="float32")
    enc = codec.encode(jnp.asarray(golden[which]), None)
    name = f"b{bits}_g{group_size}"
    codes, released = np.asarray(unpack(enc.codes, bits)), golden[f"{which}_codes_{name}"]
    tie = np.abs(quotients(golden[which], axis, bits, group_size) % 1 - 0.5) < 1e-5  # rounding may fall either way
    assert tie.mean() < 1e-3
    np.testing.assert_array_equal(codes[~tie], released[~tie])
    assert (np.abs(codes[tie].astype(int) - released[tie]) <= 1).all()
    same = codes == released
    np.testing.assert_allclose(
        np.asarray(codec.decode(enc, None))[same], golden[f"{which}_hat_{name}"][same], rtol=0, atol=1e-5
    )


def quotients(x, axis, bits, group_size):
    """What the quantiser rounds, in float64."""
    shape = (*x.shape[:-1], -1, group_size) if axis == "token" else (*x.shape[:2], -1, group_size, x.shape[-1])
    groups, along = x.astype(np.float64).reshape(shape), -1 if axis == "token" else -2
    low, high = groups.min(along, keepdims=True), groups.max(along, keepdims=True)
    return ((groups - low) / (high - low) * (2**bits - 1)).reshape(x.shape)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [2, 4])
def test_extremes_of_a_group(axis, bits):
    x = qkv(0, 1, 64)[0][:, :, 0]
    codec = Affine(bits=bits, axis=axis, group_size=32, metadata_dtype="float32")
    back, along = codec.decode(codec.encode(x, None), None), -1 if axis == "token" else -2
    shape = (1, 64, 2, 32) if axis == "token" else (1, 2, 32, HEAD_DIM)
    groups, back = x.reshape(shape), back.reshape(shape)
    np.testing.assert_array_equal(back.min(along), groups.min(along))
    np.testing.assert_allclose(back.max(along), groups.max(along), rtol=1e-6)


def test_statistics_have_the_papers_shapes():
    cache = make("kivi:bits=2,residual=128", batch=3, num_kv_heads=2, max_len=512)
    final = cache.tiers[-1]
    assert final.k.scale.shape == (3, 2, final.capacity // 32, HEAD_DIM)
    assert final.v.scale.shape == (3, 2, final.capacity, HEAD_DIM // 32)
    assert final.k.codes.shape == (3, 2, final.capacity * 2 // 32, HEAD_DIM)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 384])
def test_residual_lengths_after_a_prompt_and_while_decoding(length):
    q, k, v = qkv(0, 1, length + 40)
    cache = make("kivi:bits=2", batch=1, num_kv_heads=2, max_len=length + 40)
    _, cache = prefill(cache, q[:, :length], k[:, :length], v[:, :length])
    in_window = int(cache.length[0] - cache.settled[0])
    assert in_window == length % 128  # keys; values have the intermediate rung's 128 beside them
    held = min(int(cache.tiers[0].entered[0]), 128)
    assert in_window + held == min(length, length % 128 + 128)
    _, cache = decode_many(cache, q[:, length:], k[:, length:], v[:, length:])
    assert int(cache.length[0] - cache.settled[0]) < 2 * 128


def test_outliers_stay_where_they_are():
    k_codec = Affine(bits=2, axis="channel", group_size=32)
    v_codec = Affine(bits=2, axis="token", group_size=32)
    x = qkv(3, 1, 64)[0][:, :, 0]
    for codec, spoiled, other in (
        (k_codec, x.at[..., 5].mul(100), np.delete(np.arange(HEAD_DIM), 5)),
        (v_codec, x.at[:, 5].mul(100), np.delete(np.arange(64), 5)),
    ):
        a, b = (codec.decode(codec.encode(y, None), None) for y in (x, spoiled))
        along = 2 if codec is k_codec else 1
        chex.assert_trees_all_equal(jnp.take(a, other, along), jnp.take(b, other, along))


@pytest.mark.parametrize(("residual", "ratio"), [(128, 4.995), (32, 5.245)])
def test_bytes_of_the_papers_example(residual, ratio):
    """Llama-3-8B, 4096 tokens, 2 bits, groups of 32: counted from the arrays of one layer, 16-bit exact tokens."""
    heads, dim, tokens = 8, 128, 4096
    spec = kvc.parse(f"kivi:bits=2,residual={residual}").spec(max_len=tokens, head_dim=dim)
    cache = kvc.init(spec, batch=1, num_kv_heads=heads, head_dim=dim, dtype=jnp.bfloat16)
    rows = jnp.zeros((1, tokens, heads, dim), jnp.bfloat16)
    cache = jax.jit(lambda c, x: close_prompt(_staged(c, x)))(cache, rows)
    full = 2 * heads * dim * tokens * 2
    counters = 4 * (3 + 2 * len(cache.tiers))
    assert full / (kvc.nbytes(cache).used - counters) == pytest.approx(ratio, abs=1e-3)
    stored = sum(x.nbytes for tier in cache.tiers for x in jax.tree.leaves((tier.k, tier.v)))
    assert full / stored == pytest.approx(ratio, abs=1e-3)  # nothing in the window, no slot unused


def _staged(cache, rows):
    import dataclasses

    from kvcomp_jax.cache import Exact

    prompt = kvc.open_prompt(cache, rows.shape[1])
    heads_first = rows.swapaxes(1, 2)
    staged = Exact(k=heads_first, v=heads_first, stat=None)
    return dataclasses.replace(prompt, staged=staged, filled=jnp.full(1, rows.shape[1], jnp.int32))
