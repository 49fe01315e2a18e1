"""HACK's checklist: integer products, stored sums, the exact last block, rounding, bytes."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.codecs import Affine, Homomorphic
from kvcomp_jax.tiers import attend_by_blocks, attend_tier
from pallas_kernels.packing import unpack
from tests.laws.parts import (
    HEAD_DIM,
    contracted,
    decode,
    decode_many,
    encode,
    first_rows,
    make,
    normal,
    prefill,
    qkv,
    settle,
)


def stepwise(x, size):
    """Partitions of the last axis at 8 bits to the nearest, dequantised, in float64."""
    parts = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, size)
    low, high = parts.min(-1, keepdims=True), parts.max(-1, keepdims=True)
    step = np.where(high > low, high - low, 1) / 255
    return (np.round((parts - low) / step) * step + low).reshape(x.shape)


def dequantised(enc, axis, bits, size):
    """codes * scale + zero_point by numpy, from the stored arrays."""
    codes = np.asarray(unpack(enc.rows.codes, bits), np.float64)
    along = -1 if axis == "token" else -2
    scale, low = (np.repeat(np.asarray(x, np.float64), size, along) for x in (enc.rows.scale, enc.rows.zero_point))
    return codes * scale + low


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (2, 32), (2, 64), (3, 32), (4, 64), (8, 32)])
def test_integer_products_equal_the_product_of_the_dequantised_operands(bits, size, rounding):
    x, q, p = normal(0, 3, 128, HEAD_DIM), normal(1, 3, 7, HEAD_DIM), jnp.abs(normal(2, 3, 7, 128))
    pos = jnp.broadcast_to(jnp.arange(128), (3, 128))
    for axis in ("token", "channel"):
        codec = Homomorphic(inner=Affine(bits=bits, axis=axis, group_size=size, rounding=rounding))
        enc = encode(codec, x, pos)
        rows = dequantised(enc, axis, bits, size)
        products, _ = contracted(codec, q, p, enc, pos)
        got, want = (
            (products[0], stepwise(q, size) @ np.swapaxes(rows, -1, -2))
            if axis == "token"
            else (products[1], stepwise(p, size) @ rows)
        )
        assert float(np.abs(got - want).max()) <= 1e-4 * np.abs(want).max()


def test_stored_sums_are_the_codes_sums_before_and_after_decoding():
    q, k, v = qkv(3, 2, 100 + 3 * 64)
    cache = make("hack", batch=2, num_kv_heads=2, max_len=300)
    _, cache = prefill(cache, q[:, :100], k[:, :100], v[:, :100])
    for held in (cache, decode_many(cache, q[:, 100:], k[:, 100:], v[:, 100:])[1]):
        (tier,) = held.tiers
        for codec, enc in ((tier.k_codec, tier.k), (tier.v_codec, tier.v)):
            fmt = codec.format(HEAD_DIM)
            wanted = np.asarray(fmt.split(unpack(enc.rows.codes, 2)), np.int64).sum(fmt.group_axis)
            assert enc.sums.dtype == jnp.uint8
            np.testing.assert_array_equal(enc.sums, wanted)
    assert int(held.tiers[0].entered[0]) > int(cache.tiers[0].entered[0])


def test_sums_taken_anew_at_every_read_change_nothing():
    q, k, v = qkv(4, 2, 110)
    outs = []
    for text in ("hack:group_size=32", "hack:group_size=32,keep_sums=false"):
        cache = make(text, batch=2, num_kv_heads=2, max_len=128)
        out, cache = prefill(cache, q[:, :100], k[:, :100], v[:, :100])
        outs.append((out, decode(cache, q[:, 100:101], k[:, 100:101], v[:, 100:101])[0], kvc.nbytes(cache).metadata))
    chex.assert_trees_all_close(outs[0][:2], outs[1][:2], atol=1e-6)  # sums of integers; two programs
    groups = 2 * 2 * 96 * HEAD_DIM // 32 * 2  # rows, heads, k and v
    assert outs[0][2] - outs[1][2] == groups


@pytest.mark.parametrize("length", [1, 64, 127])
def test_metadata_shapes_and_the_exact_tail_after_every_step(length):
    q, k, v = qkv(5, 1, length + 70, heads=(2, 2))
    cache = make("hack:group_size=32", batch=1, num_kv_heads=2, max_len=length + 70)
    _, cache = prefill(cache, q[:, :length], k[:, :length], v[:, :length])
    (tier,) = cache.tiers
    slots = (length + 70) // 32 * 32
    for enc, shape in ((tier.k, (1, 2, slots, HEAD_DIM // 32)), (tier.v, (1, 2, slots // 32, HEAD_DIM))):
        assert enc.rows.scale.shape == enc.rows.zero_point.shape == enc.sums.shape == shape
    for t in range(length, length + 70):
        assert int(cache.length[0] - cache.settled[0]) == t % 32
        assert int(cache.tiers[0].entered[0]) == t - t % 32
        _, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        cache = settle(cache)


def test_a_block_is_quantised_once_and_its_codes_never_change():
    q, k, v = qkv(6, 1, 170)
    cache = make("hack:group_size=32", batch=1, num_kv_heads=2, max_len=192)
    _, cache = prefill(cache, q[:, :70], k[:, :70], v[:, :70])
    for t in range(70, 170):
        filled, before = int(cache.tiers[0].entered[0]), cache.tiers[0]
        _, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        cache = settle(cache)
        chex.assert_trees_all_equal(first_rows(before, filled), first_rows(cache.tiers[0], filled))
    assert filled == 160


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_stochastic_rounding_is_unbiased_and_off_by_less_than_a_step(axis):
    """4096 draws: the same rows at 4096 places of the text."""
    draws, rows = 4096, normal(7, 32, 32)
    codec = Affine(bits=2, axis=axis, group_size=32, rounding="stochastic", metadata_dtype="float32", seed=5)
    pos = jnp.arange(draws * 32).reshape(draws, 32)
    back = jax.jit(lambda x: codec.decode(codec.encode(x, pos), pos))(jnp.broadcast_to(rows, (draws, 32, 32)))
    back, rows = np.asarray(back), np.asarray(rows)
    along = -1 if axis == "token" else -2
    step = (rows.max(along, keepdims=True) - rows.min(along, keepdims=True)) / 3
    assert (np.abs(back.mean(0) - rows) <= step / 24).all()
    assert (np.abs(back - rows) < step * (1 + 1e-5)).all()
    assert float(back.std(0).max()) > float(step.min()) / 3  # it does draw
    nearest = dataclasses.replace(codec, rounding="nearest")
    assert (np.abs(nearest.decode(nearest.encode(jnp.asarray(rows), pos[0]), pos[0]) - rows) <= step * 0.50001).all()


@pytest.mark.parametrize("prompt_read", ["stored", "exact"])
def test_no_decoded_keys_or_values_in_a_compiled_decode_step(prompt_read):
    """Nothing in floating point has as many elements as K or V of one head; the same search finds decoded rows."""
    tokens = 4096
    cache = make(f"hack:prefill={prompt_read}", batch=1, num_kv_heads=2, max_len=tokens, dtype=jnp.bfloat16)
    step = qkv(0, 1, 1, dtype=jnp.bfloat16)
    assert _largest_float(kvc.decode, cache, *step) < tokens * HEAD_DIM / 2
    (tier,) = cache.tiers
    decoded = lambda tier: tier.k_codec.decode(tier.k, None).sum(-2) + tier.v_codec.decode(tier.v, None).std(-1).sum()
    assert _largest_float(decoded, tier) >= tokens * HEAD_DIM


def _largest_float(function, *args):
    program = jax.jit(function).lower(*args).as_text()  # before fusion: what could be written
    sizes = re.findall(r"tensor<((?:\d+x)+)(?:f32|bf16|f16)>", program)
    return max(int(np.prod([int(n) for n in size.rstrip("x").split("x")])) for size in sizes)


@pytest.mark.parametrize(("size", "bits", "ratio"), [(32, 3.25, 4.92), (64, 2.625, 6.095), (128, 2.375, 6.74)])
def test_bits_of_the_papers_example(size, bits, ratio):
    """Llama-3-8B, 4096 tokens: bits per element from the arrays of one layer."""
    heads, dim, tokens = 8, 128, 4096
    spec = kvc.parse(f"hack:group_size={size}").spec(max_len=tokens, head_dim=dim)
    cache = jax.eval_shape(lambda: kvc.init(spec, batch=1, num_kv_heads=heads, head_dim=dim, dtype=jnp.bfloat16))
    (tier,) = cache.tiers
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((tier.k, tier.v))) * 8
    assert stored / (2 * heads * dim * tokens) == bits
    assert 16 / bits == pytest.approx(ratio, abs=5e-3)
    assert (tier.k_codec.nbits(tokens, dim) + tier.v_codec.nbits(tokens, dim)) * heads == stored


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_stream_and_a_prompt_leave_identical_codes(rounding):
    q, k, v = qkv(8, 2, 140)
    text = f"hack:group_size=32,rounding={rounding}"
    _, whole = prefill(make(text, batch=2, num_kv_heads=2, max_len=160), q, k, v)
    _, stream = prefill(make(text, batch=2, num_kv_heads=2, max_len=160), q[:, :1], k[:, :1], v[:, :1])
    for t in range(1, 140):
        _, stream = decode(stream, *(x[:, t : t + 1] for x in (q, k, v)))
        stream = settle(stream)
    np.testing.assert_array_equal(whole.tiers[0].entered, 128)
    chex.assert_trees_all_equal(*(first_rows(cache.tiers[0], 128) for cache in (whole, stream)))


def test_noise_depends_on_the_seed_and_differs_between_keys_and_values():
    x, pos = normal(9, 1, 64, HEAD_DIM), jnp.arange(64)[None]
    specs = [kvc.parse(f"hack:seed={seed}").spec(max_len=64, head_dim=HEAD_DIM) for seed in (0, 1)]
    codecs = [codec.inner for spec in specs for codec in (spec.rungs[0].k, spec.rungs[0].v)]
    assert len({codec.seed for codec in codecs}) == 4
    token = [dataclasses.replace(codecs[0], seed=codec.seed).encode(x, pos).codes for codec in codecs]
    assert all((a != b).mean() > 0.3 for i, a in enumerate(token) for b in token[:i])


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_decode_step_reads_codes_through_the_fused_operation(groups):
    q, k, v = qkv(10, 2, 150, heads=(2 * groups, 2))
    cache = make("hack:group_size=32", batch=2, num_kv_heads=2, max_len=160)
    _, cache = prefill(cache, q[:, :149], k[:, :149], v[:, :149], jnp.array([149, 70]))
    (rung,) = kvc.kernels_in_use(cache, num_heads=2 * groups)
    assert rung.codecs == ("Homomorphic", "Homomorphic")
    assert rung.operation == "homomorphic_decode"
    queries = kvc.read.make_queries(cache, q[:, 149:], None, None, None)
    fused = attend_tier(queries, cache.tiers[0], 0)
    plain = attend_by_blocks(queries, cache.tiers[0], 0)
    chex.assert_trees_all_close(kvc.finalize(fused), kvc.finalize(plain), atol=5e-3)  # ties of p round either way
    chex.assert_trees_all_close(kvc.lse(fused), kvc.lse(plain), atol=1e-4)


def test_mixed_up_axes_are_read_without_the_fused_operation():
    inner = Affine(bits=4, axis="channel", group_size=32)
    rung = kvc.Rung(Homomorphic(inner=inner), Homomorphic(inner=dataclasses.replace(inner, axis="token")), 64)
    spec = kvc.LayerSpec(rungs=(rung,), block_size=32)
    cache = kvc.init(spec, batch=1, num_kv_heads=2, head_dim=HEAD_DIM, dtype=jnp.float32)
    assert kvc.kernels_in_use(cache)[0].operation == "dot and mix"
    q, k, v = qkv(11, 1, 65)
    _, cache = prefill(cache, q[:, :64], k[:, :64], v[:, :64])
    out, _ = decode(cache, q[:, 64:], k[:, 64:], v[:, 64:])
    chex.assert_trees_all_close(out, kvc.causal_attention(q, k, v)[:, 64:], atol=0.2)


def test_prompts_are_read_on_codes_and_close_to_exactly_at_8_bits():
    q, k, v = qkv(12, 1, 300)
    exact = kvc.causal_attention(q, k, v)
    outs = {
        text: prefill(make(text, batch=1, num_kv_heads=2, max_len=320), q, k, v)[0]
        for text in ("hack:bits=8", "hack:bits=2", "hack:bits=2,prefill=exact")
    }
    chex.assert_trees_all_close(outs["hack:bits=2,prefill=exact"], exact, atol=1e-5)
    chex.assert_trees_all_close(outs["hack:bits=8"], exact, atol=2e-2)
    chex.assert_trees_all_close(outs["hack:bits=2"][:, :64], exact[:, :64], atol=1e-5)  # no block is whole yet
    assert float(jnp.abs(outs["hack:bits=2"] - exact)[:, 64:].mean()) > 1e-2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hack:rounding=up", "rounding='up' must be 'nearest' or 'stochastic'"),
        ("hack:prefill=codes", "prefill='codes' must be 'exact' or 'stored'"),
        ("hack:group_size=24", "group_size=24 must be a multiple of 16"),
        ("hack:group_size=48,bits=4", "group_size=48 must divide head_dim=64"),
    ],
)
def test_impossible_options_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=512, head_dim=64)
