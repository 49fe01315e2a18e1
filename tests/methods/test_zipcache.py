"""Faithfulness of ZipCache: saliency, classes of tokens, ranges, bytes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.cache import Exact
from kvcomp_jax.codecs import Affine, ChannelScaled
from kvcomp_jax.fill import fill
from tests.laws.parts import HEAD_DIM, decode, decoded, encode, make, normal, prefill, qkv, ready, settle

LENGTHS = [190, 100, 7]


def probabilities(q, k, head):
    """Causal softmax of one query head of q [T, H, D] over its KV head of k [T, K, D], float64 [T, T]."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    logits = q[:, head] @ k[:, head * k.shape[1] // q.shape[1]].T * q.shape[-1] ** -0.5
    logits = np.where(np.tri(len(q), dtype=bool), logits, -np.inf)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    return probs / probs.sum(-1, keepdims=True)


def group_mass(q, k):
    """Sum of `probabilities` over the query heads of each KV head, [K, T, T]."""
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    return np.stack([sum(probabilities(q, k, h * groups + g) for g in range(groups)) for h in range(heads)])


def murmur(x):
    x &= 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def saliency(q, k, *, divide_by="probes"):
    """Dense reference of 5 % recent and 5 % random probes for one row's q [T, H, D], k [T, K, D]: [K, T]."""
    length, share = len(q), len(q) // 20
    recent = list(range(length - max(share, 1), length))
    probes = recent + sorted(range(recent[0]), key=murmur)[:share]
    seen_by = [sum(p >= i for p in probes) if divide_by == "probes" else length - i for i in range(length)]
    return group_mass(q, k)[:, probes].sum(1) / np.maximum(seen_by, 1)


def held_in_window(policy, heads, batch):
    """A cache that keeps every token in the window, with its statistic."""
    rung = kvc.Rung(kvc.Identity(), kvc.Identity(), 16)
    spec = kvc.LayerSpec(rungs=(rung,), policy=policy, window=256, block_size=16)
    return kvc.init(spec, batch=batch, num_kv_heads=heads[1], head_dim=HEAD_DIM, dtype=jnp.float32)


def test_uniform_attention_gives_harmonic_numbers():
    length = 64
    q, k, v = qkv(0, 1, length, (1, 1))
    for divide_by in ("probes", "queries"):
        policy = kvc.Saliency(recent=1.0, random=0.0, divide_by=divide_by)
        _, cache = prefill(held_in_window(policy, (1, 1), 1), 0 * q, k, v)
        found = np.asarray(cache.window.stat[0, 0, :length])
        harmonic = np.concatenate([[0], np.cumsum(1 / np.arange(1, length + 1))])
        sums = harmonic[-1] - harmonic[:-1]
        np.testing.assert_allclose(found, sums / (length - np.arange(length)), rtol=1e-5)
        assert sums[0] / sums[-1] == pytest.approx(304, abs=1)
        assert found[0] / found[-1] == pytest.approx(4.74, abs=0.01)


@pytest.mark.parametrize("divide_by", ["probes", "queries"])
def test_saliency_of_a_dense_reference(divide_by):
    """Ragged rows, grouped heads: each row's probes are its own share."""
    q, k, v = qkv(1, 3, 190, (4, 2))
    _, cache = prefill(held_in_window(kvc.Saliency(divide_by=divide_by), (4, 2), 3), q, k, v, jnp.array(LENGTHS))
    for row, n in enumerate(LENGTHS):
        want = saliency(q[row, :n], k[row, :n], divide_by=divide_by)
        np.testing.assert_allclose(cache.window.stat[row, :, :n], want, rtol=2e-4, atol=1e-7)


def test_saliency_while_decoding_is_the_mean_over_the_queries_since():
    """Of decoded tokens exactly; a prompt's tokens enter with what the probes said of its queries."""
    prompt, steps = 60, 20
    q, k, v = qkv(2, 1, prompt + steps, (4, 2))
    _, cache = prefill(held_in_window(kvc.Saliency(), (4, 2), 1), q[:, :prompt], k[:, :prompt], v[:, :prompt])
    before = np.asarray(cache.window.stat[0, :, :prompt])
    for t in range(prompt, prompt + steps):
        _, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
    mass, total = group_mass(q[0], k[0])[:, prompt:].sum(1), prompt + steps
    age = total - np.arange(total)
    want = mass / age
    want[:, :prompt] += before * (age - steps)[:prompt] / age[:prompt]
    np.testing.assert_allclose(cache.window.stat[0, :, :total], want, rtol=2e-4)


@pytest.mark.parametrize("text", ["zipcache", "zipcache:low_share=0.7", "zipcache:bits=8,low_bits=4,low_share=0.5"])
def test_the_least_salient_tokens_are_the_low_class(text):
    """Per row and KV head; keys and values share the class, classes are disjoint and cover all that settled."""
    lengths = [500, 330, 90]
    q, k, v = qkv(3, 3, 500, (4, 2))
    share = float(text.split("low_share=")[1]) if "low_share" in text else 0.4
    spec = kvc.parse(text).spec(max_len=500, head_dim=HEAD_DIM)
    spec = dataclasses.replace(spec, sliding_window=10**6)  # so that rungs remember positions
    cache = kvc.init(spec, batch=3, num_kv_heads=2, head_dim=HEAD_DIM, dtype=jnp.float32)
    _, cache = prefill(cache, q, k, v, jnp.array(lengths))
    sets = []
    for row, n in enumerate(lengths):
        settled = n // spec.block_size * spec.block_size
        want = saliency(q[row, :n], k[row, :n])[:, :settled]
        for head in range(2):
            high, low = (np.asarray(tier.pos[row, head]) for tier in cache.tiers)
            high, low = high[high >= 0], low[low >= 0]
            assert len(low) == int(share * settled + 1e-6)
            np.testing.assert_array_equal(np.sort(np.concatenate([high, low])), np.arange(settled))
            if settled:
                assert want[head][high].min() >= want[head][low].max() * (1 - 1e-4)
                sets.append(tuple(low))
    assert len(set(sets)) == len(sets)  # every head has its own


def test_outlier_channels_spoil_others_little_with_channel_factors():
    """4 bits, 1024 channels, one of them hundredfold: the others' error doubles, without factors it is 17 times."""
    x = normal(0, 1, 1, 256, 1024)
    spoiled = x.at[..., 5].mul(100)
    others = np.delete(np.arange(1024), 5)

    def error(codec, rows):
        codec = ready(codec, rows)
        back = decoded(codec, encode(codec, rows, None), None)
        return float(jnp.sqrt(jnp.square(back - rows)[..., others].mean() / jnp.square(rows)[..., others].mean()))

    plain = Affine(bits=4, axis="token")
    scaled = ChannelScaled(inner=plain)
    assert error(scaled, spoiled) / error(scaled, x) < 2.5
    assert error(plain, spoiled) / error(plain, x) > 10


def test_factors_come_from_each_rows_own_prompt():
    x = normal(1, 2, 2, 40, HEAD_DIM)
    live = jnp.arange(40)[None, None] < jnp.array([40, 7])[:, None, None]
    codec = ChannelScaled(inner=Affine(bits=4, axis="token")).prepare(2, 2, HEAD_DIM)
    np.testing.assert_array_equal(codec.factor, 1)
    fitted = codec.fit(x.at[..., 3].set(0.0), live).factor
    np.testing.assert_allclose(fitted[1, :, 4:], np.sqrt(np.abs(x[1, :, :7, 4:]).max(1)), rtol=1e-3)
    np.testing.assert_array_equal(fitted[..., 3], 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_errors_are_half_a_step(bits):
    x = normal(2, 1, 2, 96, HEAD_DIM)
    keys = Affine(bits=bits, axis="channel", group_size=48 if bits == 4 else 32, metadata_dtype="float32")
    enc = encode(keys, x, None)
    step = jnp.repeat(enc.scale, keys.group_size, 2)
    assert bool((jnp.abs(decoded(keys, enc, None) - x) <= step / 2 + 1e-5).all())
    values = ready(ChannelScaled(inner=Affine(bits=bits, axis="token", metadata_dtype="float32")), x)
    enc = encode(values, x, None)
    bound = values.factor[:, :, None].astype(jnp.float32) * enc.scale / 2
    assert bool((jnp.abs(decoded(values, enc, None) - x) <= bound + 1e-5).all())


@pytest.mark.parametrize(("low_share", "bits"), [(0, 4), (1, 2)])
def test_one_class_is_uniform_quantisation(low_share, bits):
    q, k, v = qkv(4, 2, 200)
    cache = make(f"zipcache:low_share={low_share},block_size=96", batch=2, num_kv_heads=2, max_len=200)
    k_codec = Affine(bits=bits, axis="channel", group_size=96)
    rung = kvc.Rung(k_codec, ChannelScaled(inner=Affine(bits=bits, axis="token")), 192)
    plain = kvc.init(
        kvc.LayerSpec(rungs=(rung,), block_size=96), batch=2, num_kv_heads=2, head_dim=HEAD_DIM, dtype=jnp.float32
    )
    (_, cache), (_, plain) = (prefill(c, q[:, :195], k[:, :195], v[:, :195]) for c in (cache, plain))
    chex.assert_trees_all_equal(cache.tiers, plain.tiers)


def test_equal_bits_give_equal_values_whatever_the_classes():
    q, k, v = qkv(5, 2, 200)
    mixed = make("zipcache:low_bits=4", batch=2, num_kv_heads=2, max_len=200)
    single = make("zipcache:low_share=0,block_size=80", batch=2, num_kv_heads=2, max_len=200)
    (_, mixed), (_, single) = (prefill(c, q, k, v) for c in (mixed, single))
    parts = [decoded(tier.v_codec, tier.v, None) for tier in mixed.tiers]
    live = [part[:, :, : int(tier.entered[0])] for part, tier in zip(parts, mixed.tiers, strict=True)]
    tier = single.tiers[0]
    whole = decoded(tier.v_codec, tier.v, None)[:, :, : int(tier.entered[0])]
    axis = np.random.default_rng(0).standard_normal(HEAD_DIM)

    def in_order(x):
        x = np.asarray(x, np.float64)
        return np.take_along_axis(x, (x @ axis).argsort(-1)[..., None], 2)

    np.testing.assert_array_equal(in_order(jnp.concatenate(live, 2)), in_order(whole))


def test_probes_alone_never_make_the_whole_matrix():
    length, heads = 2048, 2
    spec = kvc.parse("zipcache").spec(max_len=length, head_dim=16)
    cache = jax.eval_shape(lambda: kvc.init(spec, batch=1, num_kv_heads=1, head_dim=16, dtype=jnp.float32))
    q, k = (jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (heads, 1))
    compiled = jax.jit(kvc.prefill).lower(cache, q, k, k).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < heads * length * length * 4 / 3


def test_tokens_wait_at_most_a_block_before_they_are_quantised():
    """Settled every step, the buffer cycles through 0 .. g - 1."""
    q, k, v = qkv(6, 2, 260)
    cache = make("zipcache", batch=2, num_kv_heads=2, max_len=260)
    size = cache.spec.block_size
    assert size == 80  # the paper's 100, in whole words of both classes
    _, cache = prefill(cache, q[:, :90], k[:, :90], v[:, :90], jnp.array([90, 3]))
    for t in range(90, 260):
        _, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        cache = settle(cache)
        np.testing.assert_array_equal(cache.length - cache.settled, cache.length % size)
        for tier, step in zip(cache.tiers, (48, 32), strict=True):
            np.testing.assert_array_equal(tier.entered, cache.length // size * step)


def test_settled_tokens_are_never_quantised_again():
    q, k, v = qkv(7, 1, 240)
    cache = make("zipcache", batch=1, num_kv_heads=2, max_len=240)
    _, cache = prefill(cache, q[:, :160], k[:, :160], v[:, :160])
    before = [decoded(tier.k_codec, tier.k, None)[:, :, : int(tier.entered[0])] for tier in cache.tiers]
    for t in range(160, 240):
        _, cache = decode(cache, *(x[:, t : t + 1] * 5 for x in (q, k, v)))
    cache = settle(cache)
    for old, tier in zip(before, cache.tiers, strict=True):
        assert int(tier.entered[0]) > old.shape[2]
        np.testing.assert_array_equal(decoded(tier.k_codec, tier.k, None)[:, :, : old.shape[2]], old)


@pytest.mark.parametrize(
    ("across_heads", "ratio"),
    [("true", 4.955), ("false", 4.80)],  # the original's ranges of values span all heads
)
def test_bytes_of_the_papers_example(across_heads, ratio):
    """A prompt that is one block of 4080 tokens has one range of keys a channel and class, as in the original."""
    tokens, heads, dim = 4080, 8, 128
    method = kvc.parse(f"zipcache:block_size={tokens},across_heads={across_heads}")
    spec = method.spec(max_len=tokens, head_dim=dim, num_kv_heads=heads)
    cache = kvc.init(spec, batch=1, num_kv_heads=heads, head_dim=dim, dtype=jnp.bfloat16)
    rows = jnp.zeros((1, heads, tokens, dim), jnp.bfloat16)
    prompt = Exact(k=rows, v=rows, stat=jnp.zeros((1, heads, tokens)))
    cache = jax.jit(fill)(cache, prompt, jnp.array([tokens]))
    np.testing.assert_array_equal(kvc.live_tokens(cache), tokens)
    stored = sum(x.nbytes for t in cache.tiers for x in jax.tree.leaves((t.k, t.v, t.k_codec, t.v_codec)))
    assert 2 * heads * dim * tokens * 2 / stored == pytest.approx(ratio, abs=0.02)
    joined = heads * dim if across_heads == "true" else dim
    bits_k, bits_v = 3.2 + 2 * 32 / tokens, 3.2 + 32 / joined + 2 * 16 / tokens  # each rung has its factors
    assert stored == pytest.approx((bits_k + bits_v) * heads * dim * tokens / 8, rel=1e-6)
    assert all(tier.pos is None and tier.stat is None for tier in cache.tiers)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zipcache:low_share=0.37", "low_share=0.37 of block_size=None must be a multiple of 16 tokens"),
        ("zipcache:block_size=100", "low_share=0.4 of block_size=100 must be .* 80 would do"),
        ("zipcache:low_share=1.2", r"low_share=1.2 must be in \[0, 1\]"),
        ("zipcache:bits=5", "bits=5 must be one of"),
        ("zipcache:divide_by=rows", "divide_by='rows' must be"),
    ],
)
def test_impossible_options_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=400, head_dim=HEAD_DIM)
