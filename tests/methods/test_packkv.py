"""Faithfulness of PackKV: bounds, packs, repacking, buffers and bytes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.codecs import Bounded, Packs
from kvcomp_jax.orders import Alike, permute
from tests.laws.parts import HEAD_DIM, decode_many, make, normal, prefill, qkv
from tests.methods.test_kvcomp import decode, dot, encode, grown, mix, quantise, stored_codes


def packs(rel_scale, **options):
    return Packs(inner=Bounded(rel_scale=rel_scale, axis="token"), **options)


def planes_per_value(codes, pack=16):
    """Mean width of packs of codes [n, S, D]."""
    groups = np.asarray(codes, np.int64).reshape(len(codes), -1, pack, codes.shape[-1])
    return np.ceil(np.log2(groups.max(2) - groups.min(2) + 1)).mean()


@pytest.mark.parametrize("rel_scale", [0.06, 0.1, 0.2])
def test_no_value_is_off_by_more_than_half_a_relative_step_of_its_token(rel_scale):
    codec = packs(rel_scale)
    x = normal(0, 2, 128, HEAD_DIM) * jnp.exp(normal(1, 2, 128, 1))
    error = np.abs(np.asarray(decode(codec, encode(codec, x))) - x)
    spread = np.asarray(x.max(-1, keepdims=True) - x.min(-1, keepdims=True))
    assert (error <= rel_scale * spread / 2 * (1 + 2**-10) + 1e-6).all()


@pytest.mark.parametrize("kind", ["random", "constant", "full range"])
def test_codes_are_lossless(kind):
    x = normal(0, 2, 128, HEAD_DIM)
    if kind == "constant":
        x = jnp.full_like(x, 1.25)
    if kind == "full range":
        x = x.at[:, ::16].set(-9.0).at[:, 1::16].set(9.0).at[..., 0].set(-9.0).at[..., 1].set(9.0)
    codec = packs(0.1)
    enc = encode(codec, x)
    stored, lengths, fmt = codec.operands(enc)
    codes, steps = quantise(codec.inner, x)
    np.testing.assert_array_equal(stored_codes(stored, lengths, fmt), codes)
    chex.assert_trees_all_equal(enc.metadata, steps)
    if kind == "constant":
        assert bool((codec.spare_bits(enc) == codec.slot_bits(HEAD_DIM)).all())


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("kind", ["greedy", "median"])
def test_attention_does_not_depend_on_the_order(kind, across_heads):
    q, k, v = qkv(0, 2, 240)
    outs = []
    for repack in ("none", kind):
        text = f"packkv:recent=64,k_budget=none,v_budget=none,repack={repack},across_heads={across_heads}"
        cache = make(text, batch=2, num_kv_heads=2, max_len=256)
        _, cache = prefill(cache, q[:, :200], k[:, :200], v[:, :200], jnp.array([200, 140]))
        out, cache = decode_many(cache, q[:, 200:], k[:, 200:], v[:, 200:])
        outs.append((out, cache))
    (plain, before), (repacked, after) = outs
    chex.assert_trees_all_close(plain, repacked, atol=1e-5)
    # Keys and values moved together: the same pairs in another order.
    rows = []
    for cache in (before, after):
        tier, live = cache.tiers[0], int(cache.tiers[0].entered[0])
        pos = jnp.zeros((2, 2, tier.capacity), jnp.int32)
        both = [jax.jit(c.decode)(x, pos) for c, x in ((tier.k_codec, tier.k), (tier.v_codec, tier.v))]
        rows.append(np.asarray(jnp.concatenate(both, -1))[0, :, :live])
    assert not np.array_equal(*rows)
    orders = []
    for head in range(2):
        a, b = (np.lexsort(x[head].T) for x in rows)
        np.testing.assert_array_equal(rows[0][head][a], rows[1][head][b])
        orders.append(a[np.argsort(b)])
    assert np.array_equal(*orders) == across_heads


@pytest.mark.parametrize("policy", [kvc.Recency(), kvc.HeavyHitter()])
def test_positions_move_along_where_they_are_kept(policy):
    """Ranked rungs keep the position of each slot; it is that of the token whose key stands there."""
    text = "packkv:recent=64,k_rel_scale=0.01,k_budget=none,v_budget=none"
    spec = kvc.parse(text).spec(max_len=256, head_dim=HEAD_DIM)
    spec = dataclasses.replace(spec, policy=policy)
    q, k, v = qkv(4, 1, 256)
    place = jnp.arange(256.0)[None, :, None, None]
    k = k * 0.01 + place * jnp.linspace(-1, 1, HEAD_DIM)[None, None, None]  # a token's range tells its place
    cache = kvc.init(spec, batch=1, num_kv_heads=2, head_dim=HEAD_DIM, dtype=jnp.float32)
    _, cache = prefill(cache, q[:, :192], k[:, :192], v[:, :192])
    _, cache = decode_many(cache, q[:, 192:], k[:, 192:], v[:, 192:])
    tier = cache.tiers[0]
    rows = np.asarray(decode(tier.k_codec, tier.k))
    index = np.round((rows.max(-1) - rows.min(-1)) / 2)
    if tier.pos is None:
        assert not np.array_equal(index[0, 0], np.sort(index[0, 0]))
        np.testing.assert_allclose(np.sort(index[0, 0]), np.arange(256), atol=4)
    else:
        np.testing.assert_allclose(index, np.asarray(tier.pos), atol=4)


def test_sliding_windows_keep_the_order_of_time():
    cache = make("packkv:recent=64", batch=1, num_kv_heads=2, max_len=4096, window=2048)
    assert cache.tiers
    assert cache.tiers[0].order is None


@pytest.mark.parametrize(("kind", "low", "high"), [("normal", 0.985, 0.992), ("clusters", 0.70, 0.81)])
def test_greedy_repacking_narrows_packs(kind, low, high):
    """Six clusters of tokens with noise of 0.2, or plain normal rows, over 512 channels of K and V together."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 64, 512))
    if kind == "clusters":
        x = rng.standard_normal((8, 6, 512))[np.arange(8)[:, None], rng.integers(0, 6, (8, 64))] + 0.2 * x
    k, v = (jnp.asarray(half, jnp.float32)[:, None] for half in np.split(x, 2, -1))
    codec = packs(0.1)
    order = jax.jit(lambda k, v: Alike("greedy").arrange(codec, codec, k, v))(k, v)
    np.testing.assert_array_equal(jnp.sort(order, -1), np.broadcast_to(np.arange(64), (8, 1, 64)))
    before, after = (
        np.mean([planes_per_value(quantise(codec.inner, permute(half, o))[0][:, 0]) for half in (k, v)])
        for o in (jnp.broadcast_to(jnp.arange(64), (8, 1, 64)), order)
    )
    assert low <= after / before <= high


@pytest.mark.parametrize("kind", ["greedy", "median"])
def test_the_order_of_time_stays_where_it_is_not_worse(kind):
    k, v = (jnp.zeros((1, 1, 128, HEAD_DIM)), jnp.zeros((1, 1, 128, HEAD_DIM)))
    order = Alike(kind).arrange(packs(0.1), packs(0.1), k, v)
    np.testing.assert_array_equal(order[0, 0], np.arange(128))


def test_median_sorts_by_the_median_of_the_values():
    v = normal(0, 1, 1, 64, HEAD_DIM) * 0.1 + normal(1, 1, 1, 64, 1) * jnp.linspace(0.2, 1, HEAD_DIM)[None, None, None]
    codec = packs(0.02)
    order = Alike("median").arrange(codec, codec, v, v)
    medians = np.median(np.asarray(quantise(codec.inner, v)[0])[0, 0], -1)[np.asarray(order)[0, 0]]
    assert (np.diff(medians) <= 0).all()


@pytest.mark.parametrize(("rel_scale", "bits"), [(0.1, 3.536), (0.2, 2.677)])
def test_bits_of_normal_rows_are_those_of_the_formula(rel_scale, bits):
    """Widths of packs, minima and widths of widths, steps; the paper's offsets of rounds and blocks fall away."""
    codec = packs(rel_scale)
    x = normal(0, 1, 512, 1024)
    enc = encode(codec, x)
    width = planes_per_value(quantise(codec.inner, x)[0])
    w = codec.inner.code_bits()
    assert w == {0.1: 4, 0.2: 3}[rel_scale]
    formula = width + (w + int(np.ceil(np.log2(w + 1)))) / 16 + 32 / 1024
    used = codec.nbits(512, 1024) - int(codec.spare_bits(enc).sum())
    assert used == pytest.approx(formula * x.size, abs=0.5)
    assert formula + (64 + 64) / 8192 == pytest.approx(bits, abs=0.03)


def test_joined_heads_share_steps_and_every_bit_is_counted():
    """A quiet head takes fewer bits in the steps of a loud one."""
    text = "packkv:recent=64,k_budget=none,v_budget=none,across_heads="
    q, k, v = qkv(1, 2, 256)
    loud = jnp.array([1.0, 0.1])[None, None, :, None]
    held = {}
    for across_heads in (False, True):
        cache = make(f"{text}{across_heads}", batch=2, num_kv_heads=2, max_len=256)
        _, cache = prefill(cache, q, k * loud, v * loud, jnp.array([256, 130]))
        tier = cache.tiers[0]
        bits = 0
        for codec, enc in ((tier.k_codec, tier.k), (tier.v_codec, tier.v)):
            per_token = sum(leaf.nbytes for leaf in jax.tree.leaves(enc)) * 8 / (2 * tier.capacity)
            spare = np.asarray(codec.spare_bits(enc)).reshape(2, -1, tier.capacity // 64)
            for row, units in enumerate((4, 2)):
                bits += per_token * units * 64 - spare[row, :, :units].sum()
            assert spare.shape[1] == (1 if across_heads else 2)
        counters = sum(x.nbytes for x in (cache.length, cache.settled, cache.window_limit, tier.entered, tier.limit))
        exact = int((cache.length - cache.settled).sum()) * 2 * 2 * HEAD_DIM * 4
        held[across_heads] = kvc.nbytes(cache).used
        assert held[across_heads] == pytest.approx(bits / 8 + counters + exact, abs=2)
        step = np.asarray(tier.k.metadata.scale, np.float32)
        spread = np.asarray(k * loud)[0, :64].max((-1, -2) if across_heads else -1)
        spread = spread - np.asarray(k * loud)[0, :64].min((-1, -2) if across_heads else -1)
        found = np.sort(step[0, :, :64, 0].T.reshape(64, -1), 0)
        np.testing.assert_allclose(found, np.sort(0.1 * spread.reshape(64, -1), 0), rtol=2e-3)
    assert held[True] < 0.85 * held[False]


def test_buffers_after_a_prompt_and_while_decoding():
    lengths = np.array([1, 100, 191, 192, 193, 255, 256, 300])
    for cache, total in zip(grown("packkv:repack=none", lengths), (lengths, lengths + 64), strict=True):
        np.testing.assert_array_equal(kvc.live_tokens(cache), total)
        exact = np.asarray(cache.length - cache.settled)
        np.testing.assert_array_equal(exact[total < 192], total[total < 192])
        assert (exact[total >= 192] >= 128).all()
        assert (exact <= 191).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_products_equal_decode_then_multiply(dtype, tolerance):
    codec = packs(0.1)
    enc = encode(codec, normal(0, 2, 128, HEAD_DIM, dtype=dtype))
    x = decode(codec, enc)
    q, p = normal(1, 2, 3, HEAD_DIM) / 8, normal(2, 2, 3, 128) / 8
    chex.assert_trees_all_close(dot(codec, q, enc), q @ x.mT, atol=tolerance)
    chex.assert_trees_all_close(mix(codec, p, enc), p @ x, atol=tolerance)


def test_units_that_do_not_fit_are_coarser_and_never_lost():
    codec = packs(0.05, budget=2.5)
    x = jnp.concatenate([normal(0, 1, 64, HEAD_DIM), jnp.zeros((1, 64, HEAD_DIM)).at[..., ::3].set(1.0)], 1)
    enc = encode(codec, x)
    error = np.abs(np.asarray(decode(codec, enc)) - x)
    step = np.asarray(enc.metadata.scale, np.float32)
    assert (error <= step / 2 * 1.001).all()
    spread = np.asarray(x.max(-1, keepdims=True) - x.min(-1, keepdims=True))
    np.testing.assert_array_less(step[:, :64], spread[:, :64] / 2 * 1.001)  # at least 2 bits
    np.testing.assert_allclose(step[:, 64:], 0.05, rtol=1e-3)  # this unit fits as it is


@pytest.mark.parametrize(
    ("make_part", "words"),
    [
        (lambda: packs(0.1, pack=4), "pack=4 must be 8, 16 or 32"),
        (lambda: Alike("random"), "kind='random' must be"),
        (lambda: kvc.Rung(kvc.Identity(), kvc.Identity(), 64, order=Alike()), "needs keys and values in Packs"),
        (lambda: kvc.Rung(packs(0.1), packs(0.1, pack=8), 64, order=Alike()), "the same block and pack"),
        (
            lambda: kvc.Rung(packs(0.1), kvc.AcrossHeads(inner=packs(0.1), num_heads=2), 64, order=Alike()),
            "both of single heads or AcrossHeads",
        ),
        (
            lambda: kvc.parse("h2o:budget=400+packkv:across_heads=true").spec(max_len=512, head_dim=64, num_kv_heads=2),
            "encode each head alone, as with across_heads=false",
        ),
        (lambda: kvc.parse("packkv:recent=32").spec(max_len=512, head_dim=64), "recent=32 must be at least"),
        (lambda: packs(0.1, block=16).check(9, 16), "head_dim=9 makes 9 packs"),
    ],
)
def test_impossible_options_are_refused(make_part, words):
    with pytest.raises(ValueError, match=words):
        make_part()
