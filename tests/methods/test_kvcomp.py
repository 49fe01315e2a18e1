"""Faithfulness of KVComp: bounds, lossless Huffman codes of bounded length, buffers and bytes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.codecs import AcrossHeads, Bounded, Entropy
from kvcomp_jax.types import Constant
from pallas_kernels.entropy_decode import streams
from pallas_kernels.entropy_decode.rows import codes_of
from tests.laws.parts import HEAD_DIM, decode_many, make, normal, prefill, qkv
from tests.methods.fused import assert_read_is_fused

# Op by op, each operation would compile alone.
encode = jax.jit(lambda codec, x, pos=None: codec.encode(x, pos))
decode = jax.jit(lambda codec, enc, pos=None: codec.decode(enc, pos))
dot = jax.jit(lambda codec, q, enc: codec.dot(q, enc, None))
mix = jax.jit(lambda codec, p, enc: codec.mix(p, enc, None))
quantise = jax.jit(lambda codec, x: codec.quantise(x, 1.0))
fit = jax.jit(lambda codec, x, live: codec.fit(x, live))
stored_codes = jax.jit(codes_of, static_argnums=2)

REGIONS = {"block": (-1, -2), "token": (-1,), "channel": (-2,)}


def bounded(axis, rel_scale, **options):
    return Bounded(rel_scale=rel_scale, axis=axis, group_size=None if axis == "token" else 64, **options)


def ranges(x, axis, block=64):
    """Range of each value's region, of x's shape."""
    blocks = x.reshape(*x.shape[:-2], -1, block, x.shape[-1])
    along = REGIONS[axis]
    spread = blocks.max(along, keepdims=True) - blocks.min(along, keepdims=True)
    return np.broadcast_to(spread, blocks.shape).reshape(x.shape)


@pytest.mark.parametrize("rel_scale", [0.03, 0.05, 0.1, 0.25])
@pytest.mark.parametrize("axis", REGIONS)
def test_no_value_is_off_by_more_than_half_a_relative_step(axis, rel_scale):
    """Per block, token (of one head) and channel, far from zero, too; the step is rounded to float16."""
    codec = bounded(axis, rel_scale)
    for x in (normal(0, 2, 128, HEAD_DIM), normal(1, 2, 128, HEAD_DIM) * 5 + 90.0):
        error = np.abs(np.asarray(decode(codec, encode(codec, x))) - x)
        bound = rel_scale * ranges(np.asarray(x), axis) / 2
        assert (error <= bound * (1 + 2**-10) + 1e-5).all()
        assert error.max() > 0.9 * bound.min()  # the step is not finer than asked for


@pytest.mark.parametrize("rel_scale", [0.03, 0.05, 0.1, 0.25])
@pytest.mark.parametrize("axis", REGIONS)
def test_the_bound_over_all_heads_is_half_a_relative_step_of_their_common_range(axis, rel_scale):
    """A block or a token has one step for all heads, a channel one of its own; the first head is the quieter one."""
    codec, pos = AcrossHeads(inner=bounded(axis, rel_scale), num_heads=2), jnp.zeros((1, 2, 128), jnp.int32)
    x = normal(2, 1, 2, 128, HEAD_DIM).at[:, 1].mul(3.0)
    error = np.abs(np.asarray(decode(codec, encode(codec, x, pos), pos)) - x)
    joined = np.concatenate(np.asarray(x).swapaxes(0, 1), -1)  # [1, 128, 2 D]
    spread = np.stack(np.split(ranges(joined, axis), 2, -1), 1)  # [1, 2, 128, D]
    bound = rel_scale * spread / 2
    assert (error <= bound * (1 + 2**-10) + 1e-5).all()
    assert ((error / bound).max((0, 2, 3)) > 0.9).all()  # of neither head is the step finer
    assert (error / bound).max() > 0.99


def test_a_byte_for_the_zero_bin_coarsens_only_regions_far_from_zero():
    near, far = normal(0, 1, 64, HEAD_DIM), normal(0, 1, 64, HEAD_DIM) + 500.0
    wide, narrow = bounded("block", 0.05), bounded("block", 0.05, zero_dtype="int8")
    chex.assert_trees_all_equal(*(quantise(codec, near)[0] for codec in (wide, narrow)))
    step = np.asarray(quantise(narrow, far)[1].scale, np.float32)
    np.testing.assert_allclose(step.squeeze(), far.min() / 126, rtol=1e-3)
    error = np.abs(np.asarray(decode(narrow, encode(narrow, far))) - far)
    assert error.max() <= step.squeeze() / 2 * 1.001


def symbols(codec, enc):
    stored, lengths, fmt = codec.operands(enc)
    return np.asarray(stored_codes(stored, lengths, fmt))


@pytest.mark.parametrize("along", ["token", "channel"])
@pytest.mark.parametrize("kind", ["random", "constant", "unseen symbols"])
def test_huffman_codes_are_lossless(kind, along):
    """Also for symbols that the prompt, from which the tables come, does not hold."""
    codec = Entropy(inner=bounded("block", 0.05), along=along).prepare(1, 2, HEAD_DIM)
    x = jnp.full((1, 2, 128, HEAD_DIM), -2.5) if kind == "constant" else normal(3, 1, 2, 128, HEAD_DIM)
    peaked = jnp.zeros_like(x).at[:, :, ::64, 0].set(1.0)
    codec = fit(codec, peaked if kind == "unseen symbols" else x, jnp.ones((1, 1, 128), bool))
    enc = encode(codec, x)
    codes, steps = quantise(codec.inner, x)
    np.testing.assert_array_equal(symbols(codec, enc), codes)
    chex.assert_trees_all_equal(enc.metadata, steps)
    if kind == "unseen symbols":
        histogram = np.bincount(np.asarray(quantise(codec.inner, peaked)[0]).ravel(), minlength=22)
        assert (histogram > 0).sum() == 2
        assert len(np.unique(codes)) > 15
        assert bool((enc.choice == 1).all())  # plain packing, as the tables do not suit
    else:
        assert bool((enc.choice == 0).all())


def test_every_symbol_has_a_code_of_bounded_length():
    codec = Entropy(inner=bounded("token", 0.03), budget=3.0).prepare(1, 1, HEAD_DIM)
    codec = fit(codec, normal(0, 1, 1, 128, HEAD_DIM), jnp.ones((1, 1, 128), bool))
    lengths = np.asarray(codec.lengths)
    assert lengths.shape == (1, 1, len(codec.stretches), 36)
    assert lengths.min() >= 1
    assert lengths.max() <= codec.max_bits == 8
    assert ((2.0 ** -lengths.astype(float)).sum(-1) <= 1).all()


@pytest.mark.parametrize(("axis", "rel_scale"), [("block", 0.05), ("token", 0.1), ("token", 0.05)])
def test_mean_code_length_is_close_to_the_entropy(axis, rel_scale):
    codec = Entropy(inner=bounded(axis, rel_scale)).prepare(1, 1, HEAD_DIM)
    x = normal(5, 1, 1, 512, HEAD_DIM)
    codec = fit(codec, x, jnp.ones((1, 1, 512), bool))
    codes = np.asarray(quantise(codec.inner, x)[0])
    p = np.bincount(codes.ravel()) / codes.size
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    mean = np.asarray(codec.lengths)[0, 0, 0][codes].mean()
    assert (p > 0).sum() >= 8
    assert entropy <= mean <= entropy + 0.1


@pytest.mark.parametrize("num_queries", [3, pytest.param(40, marks=pytest.mark.slow)])  # on symbols, by products
@pytest.mark.parametrize("axis", REGIONS)
def test_fused_products_equal_decode_then_multiply(axis, num_queries):
    for along in ("token", "channel"):
        codec = Entropy(inner=bounded(axis, 0.05), along=along)
        enc = encode(codec, normal(0, 2, 128, HEAD_DIM))
        x = decode(codec, enc)
        q, p = normal(1, 2, num_queries, HEAD_DIM), normal(2, 2, num_queries, 128)
        chex.assert_trees_all_close(dot(codec, q, enc), q @ x.mT, atol=1e-4)
        chex.assert_trees_all_close(mix(codec, p, enc), p @ x, atol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "packkv:block_size=32,pack=8,recent=32",
        pytest.param(
            "kvcomp:block_size=32,k_recent=32,v_recent=32,k_budget=none,v_budget=none", marks=pytest.mark.slow
        ),
    ],
)
def test_a_decode_step_reads_codes_through_the_fused_operation(text):
    assert_read_is_fused(text, "entropy_decode")


def grown(text, lengths, steps=64):
    """A cache after prompts of several lengths, and after `steps` more tokens in each row."""
    q, k, v = qkv(0, len(lengths), max(lengths) + steps, heads=(1, 1))
    cache = make(text, batch=len(lengths), num_kv_heads=1, max_len=max(lengths) + steps)
    length, prompt = jnp.array(lengths), max(lengths)
    _, after_prompt = prefill(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt], length)
    at = (length[:, None] + jnp.arange(steps)[None])[..., None, None]
    _, cache = decode_many(after_prompt, *(jnp.take_along_axis(x, at, 1) for x in (q, k, v)))
    return after_prompt, cache


@pytest.mark.slow
def test_buffers_after_a_prompt_and_while_decoding():
    lengths = np.array([1, 100, 127, 128, 255, 256, 300, 330])
    for cache, total in zip(grown("kvcomp:k_budget=none,v_budget=none", lengths), (lengths, lengths + 64), strict=True):
        np.testing.assert_array_equal(kvc.live_tokens(cache), total)
        keys = np.asarray(cache.length - cache.settled)
        values = keys + np.minimum(cache.tiers[0].entered, cache.tiers[0].capacity)
        np.testing.assert_array_equal(keys[total < 128], total[total < 128])
        assert (keys[total >= 128] >= 64).all()
        assert (keys < 128).all()
        assert (values >= np.minimum(total, 128)).all()
        assert (values < 256).all()


@pytest.mark.slow
def test_streaming_gives_the_symbols_steps_and_zero_bins_of_one_shot():
    q, k, v = qkv(1, 1, 400)
    text = "kvcomp:k_budget=none,v_budget=none"
    short, whole = (make(text, batch=1, num_kv_heads=2, max_len=400) for _ in range(2))
    _, short = prefill(short, q[:, :130], k[:, :130], v[:, :130])
    _, short = decode_many(short, q[:, 130:386], k[:, 130:386], v[:, 130:386])
    _, whole = prefill(whole, q[:, :386], k[:, :386], v[:, :386])
    np.testing.assert_array_equal(short.settled, whole.settled)
    for a, b in zip(short.tiers, whole.tiers, strict=True):
        np.testing.assert_array_equal(a.entered, b.entered)
        filled = min(int(a.entered[0]), a.capacity)
        chex.assert_trees_all_equal(a.k.metadata, b.k.metadata)
        np.testing.assert_array_equal(*(symbols(t.k_codec, t.k)[:, :, :filled] for t in (a, b)))
    last = short.tiers[-1].entered[0]
    np.testing.assert_array_equal(*(symbols(c.tiers[-1].v_codec, c.tiers[-1].v)[:, :, :last] for c in (short, whole)))


def test_bytes_are_payload_and_metadata_of_known_counts():
    """Codes of a known histogram: the payload is counted by hand."""
    codec = Entropy(inner=bounded("token", 0.1, zero_dtype="int8"), along="channel").prepare(1, 1, HEAD_DIM)
    x = normal(7, 1, 1, 128, HEAD_DIM)
    codec = fit(codec, x, jnp.ones((1, 1, 128), bool))
    enc = encode(codec, x)
    bits = np.asarray(codec.lengths)[0, 0, 0][np.asarray(quantise(codec.inner, x)[0])[0, 0]]  # [128, D]
    per_stream = bits.reshape(2, 64, HEAD_DIM // 2, 2).sum((1, 3))  # two channels of a unit's 64 tokens
    payload = 8 * np.ceil(per_stream / 8).sum()
    used = codec.nbits(128, HEAD_DIM) - int(codec.spare_bits(enc).sum())
    assert used == payload + 8 * per_stream.size + 8 * 2 + 24 * 128


def test_nbytes_counts_slots_as_allocated_and_codes_as_used():
    q, k, v = qkv(2, 2, 256)
    cache = make("kvcomp:k_recent=64,v_recent=64,k_budget=none,v_budget=none", batch=2, num_kv_heads=2, max_len=256)
    _, cache = prefill(cache, q, k, v, jnp.array([256, 130]))
    spec = kvc.parse("kvcomp:k_recent=64,v_recent=64,k_budget=none,v_budget=none")
    plan = spec.plan(kvc.Layout(num_layers=1, num_kv_heads=2, head_dim=HEAD_DIM), max_len=256)
    held, bound = kvc.nbytes((cache,)), kvc.forecast(plan, [256, 130], jnp.float32)
    assert held.allocated == bound.allocated
    assert held.metadata == bound.metadata
    tier, saved = cache.tiers[0], 0
    for codec, enc in ((tier.k_codec, tier.k), (tier.v_codec, tier.v)):
        spare = np.asarray(codec.spare_bits(enc))
        saved += spare[0].sum() + spare[1, :, :2].sum()  # the second row has two blocks of 64
    assert bound.used - held.used == saved // 8
    assert 0.5 < held.used / bound.used < 0.9


def test_keys_before_rope_are_what_is_quantised_and_wrapped_slots_count_what_they_use():
    """A channel that rotates fast has a narrow range before its rotation, so its step is finer than after it."""
    rope = kvc.Rotary(Constant(np.ones(HEAD_DIM // 2, np.float32)))
    layout = kvc.Layout(num_layers=1, num_kv_heads=2, head_dim=HEAD_DIM, ropes=(rope,))
    options = "k_axis=channel,k_rel_scale=0.25,k_budget=none,k_recent=64,v_recent=64"
    before, after = (
        kvc.parse(f"kvcomp:{options},pre_rope={on}").plan(layout, max_len=128).specs[0].rungs[-1].k
        for on in ("true", "false")
    )
    pos = jnp.broadcast_to(jnp.arange(128), (1, 2, 128))
    plain = 5.0 + 0.1 * normal(0, 1, 2, 128, HEAD_DIM)
    x = rope.apply(plain, pos)
    enc, rotated = encode(before, x, pos), encode(after, x, pos)
    errors = [np.abs(np.asarray(decode(codec, e, pos) - x)).mean() for codec, e in ((before, enc), (after, rotated))]
    assert errors[0] < errors[1] / 5
    assert 0 < int(before.spare_bits(enc).min()) < before.nbits(64, HEAD_DIM)


@pytest.mark.parametrize(
    ("axis", "rel_scale", "along", "block", "mean_bits"),
    [("block", 0.05, "token", 64, 3.35), ("token", 0.1, "channel", 128, 2.80)],
)
def test_bits_of_normal_rows_are_those_of_the_specification(axis, rel_scale, along, block, mean_bits):
    """1,024 channels under one step, as eight heads of 128 have them together in the paper."""
    group_size = None if axis == "token" else 64
    codec = Entropy(
        inner=Bounded(rel_scale=rel_scale, axis=axis, group_size=group_size, zero_dtype="int8"),
        block=block,
        along=along,
    ).prepare(1, 1, 1024)
    x = normal(11, 1, 1, 256, 1024)
    codec = fit(codec, x, jnp.ones((1, 1, 256), bool))
    enc = encode(codec, x)
    codes = np.asarray(quantise(codec.inner, x)[0])
    assert np.asarray(codec.lengths)[0, 0, 0][codes].mean() == pytest.approx(mean_bits, abs=0.05)
    payload = 8 * np.asarray(enc.ends, np.int64).sum()
    steps = codec.inner.metadata_bits(256, 1024)
    papers = payload + 16 * enc.ends.size + 64 * x.size / 8192 + steps  # its offsets have 16 bits, its blocks 8 bytes
    total = {"block": 3.51, "token": 2.98}[axis]  # 4.93 times smaller than 16 bits, together
    assert papers / x.size == pytest.approx(total, abs=0.05)
    used = codec.nbits(256, 1024) - int(codec.spare_bits(enc).sum())
    assert used == payload + 8 * enc.ends.size + 8 * enc.choice.size + steps
    assert used < papers


@pytest.mark.parametrize("budget", [2.0, 2.6, 3.0, 4.5])
def test_units_that_do_not_fit_are_coarser_and_never_lost(budget):
    """Whatever the data: half of the step that is stored bounds the error, and that step is no wider than plain."""
    codec = Entropy(inner=bounded("block", 0.02), budget=budget)
    rng = np.random.default_rng(0)
    flat = rng.random((1, 64, HEAD_DIM)) - 0.5  # as hard to code as can be
    peaked = rng.standard_normal((1, 64, HEAD_DIM)) * np.where(rng.random((1, 64, HEAD_DIM)) < 0.02, 30, 1)
    x = jnp.asarray(np.concatenate([flat, peaked], 1), jnp.float32)
    enc = encode(codec, x)
    assert sum(a.nbytes for a in jax.tree.leaves(enc)) * 8 == codec.nbits(128, HEAD_DIM)
    error = np.abs(np.asarray(decode(codec, enc)) - x).reshape(1, 2, -1).max(-1)
    step = np.asarray(enc.metadata.scale, np.float32)[..., 0]
    assert (error <= step / 2 * 1.001).all()
    levels = 2 ** min(int(budget), codec.inner.code_bits()) - 2
    spread = ranges(np.asarray(x), "block")[:, ::64, 0]
    assert (step <= spread / levels * 1.001).all()
    assert enc.choice[0, 0] >= enc.choice[0, 1]  # uniform values are the harder ones


@pytest.mark.slow
def test_finest_steps_that_fit_are_taken():
    codec = Entropy(inner=bounded("block", 0.02), budget=3.0)
    x = normal(0, 1, 64, HEAD_DIM)
    chosen = int(encode(codec, x).choice[0, 0])
    assert 0 < chosen < len(codec.stretches)
    table = codec._tables((1,))[:, chosen - 1]
    finer = codec.inner.quantise(x, codec.stretches[chosen - 1])[0]
    assert int(streams.stream_bytes(finer, table, codec.format(HEAD_DIM)).sum()) * 8 > codec.slot_bits(HEAD_DIM)


def test_rows_have_tables_of_their_own_prompts():
    codec = Entropy(inner=bounded("token", 0.1)).prepare(3, 1, HEAD_DIM)
    x = jnp.concatenate([normal(0, 1, 1, 128, HEAD_DIM), normal(1, 1, 1, 128, HEAD_DIM) ** 3, normal(2, 1, 1, 128, 64)])
    live = (jnp.arange(128)[None] < jnp.array([128, 100, 40])[:, None])[:, None]
    fitted = fit(codec, x, live)
    assert not bool((fitted.lengths[0] == fitted.lengths[1]).all())
    chex.assert_trees_all_equal(fitted.lengths[2], codec.lengths[2])  # not a whole block of tokens
    alone = dataclasses.replace(codec, lengths=codec.lengths[:1]).fit(x[1:2, :, :64], live[1:2, :, :64])
    chex.assert_trees_all_equal(fitted.lengths[1], alone.lengths[0])


@pytest.mark.parametrize(
    ("make_codec", "words"),
    [
        (lambda: Bounded(rel_scale=0.001, axis="token"), "rel_scale=0.001 must be in"),
        (lambda: Bounded(rel_scale=0.1, axis="block"), "group_size=None must be tokens"),
        (lambda: Bounded(rel_scale=0.1, axis="head"), "axis='head' must be"),
        (lambda: Entropy(inner=bounded("block", 0.05), block=32), "block=32 must be a multiple of 64"),
        (lambda: Entropy(inner=bounded("block", 0.05), budget=1.0), "budget=1.0 must be None or at least 2"),
        (
            lambda: Entropy(inner=kvc.Affine(bits=4, axis="token", symmetric=True), budget=3),
            "symmetric codes are centred",
        ),
        (lambda: Entropy(inner=kvc.Identity()), "needs an inner codec with integer codes"),
        (
            lambda: Entropy(inner=kvc.Codebook(levels=Constant(np.arange(4.0)))),
            "needs an inner codec with integer codes",
        ),
        (lambda: kvc.parse("kvcomp:k_recent=32").spec(max_len=512, head_dim=64), "k_recent=32 >= block_size=64"),
    ],
)
def test_impossible_options_are_refused(make_codec, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make_codec()
