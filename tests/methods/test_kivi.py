"""Faithfulness of KIVI: the released quantiser's codes, residuals and bytes."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.codecs import Affine
from kvcomp_jax.read import make_queries
from kvcomp_jax.tiers import attend_tier
from pallas_kernels.packing import unpack
from tests.laws.parts import (
    HEAD_DIM,
    close_prompt,
    decode,
    decoded,
    encode,
    first_rows,
    make,
    normal,
    prefill,
    qkv,
    settle,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "methods" / "kivi_quantizer.npz"


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("which", "axis"), [("k", "channel"), ("v", "token")])
def test_codes_of_the_released_quantiser(which, axis, bits, group_size):
    golden = np.load(GOLDEN)
    codec = Affine(bits=bits, axis=axis, group_size=group_size, metadata_dtype="float32")
    enc = encode(codec, jnp.asarray(golden[which]), None)
    name = f"b{bits}_g{group_size}"
    codes, released = np.asarray(unpack(enc.codes, bits)), golden[f"{which}_codes_{name}"]
    same = codes == released
    if (which, bits, group_size) == ("k", 4, 64):  # one of all: 9.499999, which the released float32 quotient calls 9.5
        assert (~same).sum() == 1
        assert (codes[~same], released[~same]) == (9, 10)
        assert quotients(golden[which], axis, bits, group_size)[~same] == pytest.approx(9.499999, abs=1e-7)
    else:
        assert same.all()
    np.testing.assert_allclose(
        np.asarray(decoded(codec, enc, None))[same], golden[f"{which}_hat_{name}"][same], rtol=0, atol=1e-5
    )


def quotients(x, axis, bits, group_size):
    """What the quantiser rounds, in float64."""
    shape = (*x.shape[:-1], -1, group_size) if axis == "token" else (*x.shape[:2], -1, group_size, x.shape[-1])
    groups, along = x.astype(np.float64).reshape(shape), -1 if axis == "token" else -2
    low, high = groups.min(along, keepdims=True), groups.max(along, keepdims=True)
    return ((groups - low) / (high - low) * (2**bits - 1)).reshape(x.shape)


@pytest.mark.parametrize("metadata_dtype", ["float16", "float32"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_errors_and_extremes_of_a_group(axis, bits, group_size, metadata_dtype):
    """Half a step and 4 ulp at most; the minimum comes back exactly and has code 0, the maximum has the last code.

    The maximum is off by 4 ulp at most, at float32 by 6: a 15th of the range is a product with the rounded 1 / 15.
    """
    x = np.asarray(normal(0, 2, 128, 128)).astype(metadata_dtype).astype(np.float32)
    codec = Affine(bits=bits, axis=axis, group_size=group_size, metadata_dtype=metadata_dtype)
    enc = encode(codec, jnp.asarray(x), None)
    split = codec.format(128).split
    along = -1 if axis == "token" else -2
    groups, back, codes = (np.asarray(split(a)) for a in (x, decoded(codec, enc, None), unpack(enc.codes, bits)))
    step = np.expand_dims(np.asarray(enc.scale, np.float32), along)
    largest = np.abs(groups).max(along, keepdims=True)
    ulp = np.spacing(largest.astype(metadata_dtype)).astype(np.float32)
    assert (np.abs(back - groups) <= step / 2 + 4 * ulp).all()
    low, high = groups.min(along, keepdims=True), groups.max(along, keepdims=True)
    np.testing.assert_array_equal(back.min(along, keepdims=True), low)
    assert (codes[groups == low] == 0).all()
    assert (codes[groups == high] == 2**bits - 1).all()
    most = 4 if metadata_dtype == "float16" else 6
    assert (np.abs(back.max(along, keepdims=True) - high) <= most * ulp).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_statistics_have_the_papers_shapes(group_size):
    spec = kvc.parse(f"kivi:bits=2,group_size={group_size}").spec(max_len=512, head_dim=128)
    final = kvc.init(spec, batch=3, num_kv_heads=2, head_dim=128, dtype=jnp.bfloat16).tiers[-1]
    assert final.capacity == 384
    assert final.k.scale.shape == final.k.zero_point.shape == (3, 2, final.capacity // group_size, 128)
    assert final.v.scale.shape == final.v.zero_point.shape == (3, 2, final.capacity, 128 // group_size)
    assert final.k.codes.shape == final.v.codes.shape == (3, 2, final.capacity * 2 // 32, 128)


def test_reading_a_prompt_gives_the_uncompressed_cache_s_output_to_the_bit():
    q, k, v = qkv(1, 2, 200, dtype=jnp.bfloat16)
    outs = [
        prefill(make(text, batch=2, num_kv_heads=2, max_len=200, dtype=jnp.bfloat16), q, k, v)[0]
        for text in ("kivi:bits=2,residual=32", "full")
    ]
    chex.assert_trees_all_equal(*outs)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (4, 64), (2, 128)])
def test_a_stream_and_a_prompt_leave_identical_codes(bits, group_size):
    """Statistics are of groups at fixed places in the text, however it comes."""
    length, residual, dim = 2 * group_size + 150, group_size, 128
    spec = kvc.parse(f"kivi:bits={bits},group_size={group_size},residual={residual}").spec(max_len=512, head_dim=dim)
    empty = kvc.init(spec, batch=1, num_kv_heads=2, head_dim=dim, dtype=jnp.float32)
    q, k, v = qkv(2, 1, length, head_dim=dim)
    _, whole = prefill(empty, q, k, v)
    _, stream = prefill(empty, q[:, :50], k[:, :50], v[:, :50])
    step = jax.jit(lambda c, *x: kvc.settle(kvc.decode(c, *x)[1]))
    for t in range(50, length):
        stream = step(stream, *(x[:, t : t + 1] for x in (q, k, v)))
    for a, b in zip(whole.tiers, stream.tiers, strict=True):
        np.testing.assert_array_equal(a.entered, b.entered)
        filled = min(int(a.entered[0]), a.capacity)
        assert filled > 0
        chex.assert_trees_all_equal(first_rows(a, filled), first_rows(b, filled))


@pytest.mark.parametrize(
    ("dtype", "without", "rtol"),
    [
        ("float32", "cpu", 1e-5),
        *(pytest.param(x, "", rtol, marks=pytest.mark.slow) for x, rtol in (("float32", 1e-4), ("bfloat16", 1e-3))),
    ],
)
def test_the_fused_read_equals_attention_over_decoded_rows(dtype, without, rtol, monkeypatch):
    """The compiled CPU kernel rounds queries and probabilities to 16 bits; plain JAX does not."""
    monkeypatch.setenv("KVCOMP_WITHOUT", without)
    q, k, v = (x.astype(dtype) for x in qkv(3, 1, 200, heads=(6, 2)))
    cache = make("kivi:bits=2,residual=32", batch=1, num_kv_heads=2, max_len=200, dtype=jnp.dtype(dtype))
    _, cache = prefill(cache, q, k, v)
    tier = cache.tiers[-1]
    filled = min(int(tier.entered[0]), tier.capacity)
    queries = make_queries(cache, q[:, -1:], None, None, None)
    state = attend_tier(queries, tier, 0)
    keys, values = (
        np.asarray(decoded(codec, enc, None), np.float64)[:, :, :filled]
        for codec, enc in ((tier.k_codec, tier.k), (tier.v_codec, tier.v))
    )
    logits = np.asarray(queries.q, np.float64) @ keys.swapaxes(-1, -2)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = p @ values / p.sum(-1, keepdims=True)
    assert np.abs(kvc.finalize(state) - want).max() <= rtol * np.abs(want).max()


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 384])
def test_residual_lengths_after_a_prompt_and_while_decoding(length):
    q, k, v = qkv(0, 1, length + 140)
    cache = make("kivi:bits=2", batch=1, num_kv_heads=2, max_len=640)
    _, cache = prefill(cache, q[:, :length], k[:, :length], v[:, :length])
    in_window = int(cache.length[0] - cache.settled[0])
    assert in_window == length % 128  # exact keys; values have the intermediate rung's 128 beside them, not R in all
    held = min(int(cache.tiers[0].entered[0]), 128)
    assert in_window + held == min(length, length % 128 + 128)
    for t in range(length, length + 140):
        _, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        cache = settle(cache)
        assert int(cache.length[0] - cache.settled[0]) == (t + 1) % 128
        assert int(cache.tiers[0].entered[0]) == (t + 1) // 128 * 128


def test_outliers_stay_where_they_are():
    k_codec = Affine(bits=2, axis="channel", group_size=32)
    v_codec = Affine(bits=2, axis="token", group_size=32)
    x = jnp.asarray(qkv(3, 1, 64)[0][:, :, 0])
    for codec, spoiled, other in (
        (k_codec, x.at[..., 5].mul(100), np.delete(np.arange(HEAD_DIM), 5)),
        (v_codec, x.at[:, 5].mul(100), np.delete(np.arange(64), 5)),
    ):
        a, b = (decoded(codec, encode(codec, y, None), None) for y in (x, spoiled))
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
