"""Faithfulness of TurboQuant: optimal levels, published distortions, kept norms, unbiased sketches, bytes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.codecs import Codebook
from kvcomp_jax.codecs.lloyd_max import lloyd_max, sphere_levels
from tests.laws.parts import HEAD_DIM, decode_many, decoded, encode, make, normal, prefill, qkv


def sphere(seed, count, dim):
    x = np.asarray(normal(seed, count, dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("dim", [3, 16, 64, 80, 128])
def test_one_bit_levels_are_the_mean_size_of_a_coordinate(dim):
    mean = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)
    np.testing.assert_allclose(sphere_levels(1, dim).value, np.array([-mean, mean]) * math.sqrt(dim), rtol=1e-5)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_the_centres_of_their_cells(bits, dim):
    """The condition of Lloyd and Max, by a plain sum over the density of a coordinate."""
    levels = sphere_levels(bits, dim).value.astype(np.float64)
    t = (np.arange(400_000) + 0.5) / 200_000 - 1  # of the unit vector
    density = (1 - t * t) ** ((dim - 3) / 2)
    cell = np.abs(t[:, None] * math.sqrt(dim) - levels).argmin(-1)
    for i, level in enumerate(levels):
        inside = cell == i
        centre = (t[inside] * density[inside]).sum() / density[inside].sum()
        assert level == pytest.approx(centre * math.sqrt(dim), abs=2e-3)
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-6)
    assert sphere_levels(bits, dim) is sphere_levels(bits, dim)


def test_levels_of_an_even_density_are_even():
    np.testing.assert_allclose(lloyd_max(np.linspace(0, 1, 1001), np.ones(1001), 4), [0.125, 0.375, 0.625, 0.875])


def test_many_dimensions_give_the_normal_distributions_levels():
    """Max 1960, table I: 4 levels of a unit normal."""
    np.testing.assert_allclose(sphere_levels(2, 4096).value, [-1.510, -0.4528, 0.4528, 1.510], atol=2e-3)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.117), (3, 0.03), (4, 0.009)])
@pytest.mark.parametrize(("lone", "rel"), [(0.0, 0.15), (5.0, 0.15), (1000.0, 0.35)])
def test_distortion_is_the_published_one_whatever_the_vectors(lone, rel, bits, distortion):
    """Theorem 1, in dimension 128: errors of unit vectors, random ones or with one channel above all others.

    Alone, all channels come out as permutations of one another: a single draw, hence the tolerance.
    """
    error = distortion_of(f"turboquant:bits={bits}", lone)
    assert error == pytest.approx(distortion, rel=rel)
    assert 4.0**-bits <= error <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


def distortion_of(text, lone):
    codec = kvc.parse(text).spec(max_len=64, head_dim=128).rungs[0].k
    x = sphere(0, 512, 128)
    x[np.arange(512), np.random.default_rng(0).integers(0, 128, 512)] += lone
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    back = np.asarray(decoded(codec, encode(codec, jnp.asarray(x), None), None))
    return np.square(back - x).sum(-1).mean()


def test_one_rotation_leaves_lone_channels_between_the_levels():
    """All coordinates of a row with one channel become equal in size: no sample of the sphere's coordinates."""
    assert distortion_of("turboquant:bits=2,rotations=1", 1000.0) > 1.5 * 0.117


@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 5e-4), ("float32", 1e-6)])
def test_norms_are_kept(dtype, rtol):
    codec = kvc.parse(f"turboquant:metadata_dtype={dtype}").spec(max_len=64, head_dim=HEAD_DIM).rungs[0].k
    x = np.asarray(normal(3, 64, HEAD_DIM)) * np.logspace(-2, 2, 64)[:, None].astype(np.float32)
    enc = encode(codec, jnp.asarray(x), None)
    assert enc.scale.dtype == dtype
    np.testing.assert_allclose(enc.scale * math.sqrt(HEAD_DIM), np.linalg.norm(x, axis=-1), rtol=rtol)
    np.testing.assert_allclose(decoded(codec, enc, None), x, atol=0.25 * np.abs(x).max(-1).max())


def test_seeds_choose_the_rotation():
    x = normal(0, 1, 64, HEAD_DIM)
    codecs = [kvc.parse(f"turboquant:seed={s}").spec(max_len=64, head_dim=HEAD_DIM).rungs[0].k for s in (0, 0, 1)]
    codes = [np.asarray(encode(codec, x, None).codes) for codec in codecs]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).mean() > 0.5


def test_sketched_keys_have_one_bit_of_level_fewer_and_values_none():
    rung = kvc.parse("turboquant:bits=3,sketch=true").spec(max_len=64, head_dim=128).rungs[0]
    assert (rung.k.name, rung.v.name) == ("Rotated(Rotated(Sketched(Codebook)))", "Rotated(Rotated(Codebook))")
    assert (rung.k.stored.inner.bits, rung.v.stored.bits) == (2, 3)


@pytest.mark.slow
def test_sketched_products_are_right_on_average():
    """Theorem 2, through rotation and levels; without the sketch 2 bits shrink products by their distortion."""
    x = jnp.asarray(sphere(0, 32, HEAD_DIM))

    def bias(text, seeds):
        found = []
        for seed in range(seeds):
            codec = kvc.parse(f"{text},seed={seed}").spec(max_len=64, head_dim=HEAD_DIM).rungs[0].k
            found.append(np.diagonal(np.asarray(codec.dot(x, encode(codec, x, None), None))) - 1)
        return np.mean(found), np.std(found) / math.sqrt(np.size(found))

    plain, _ = bias("turboquant:bits=2", 4)
    assert plain == pytest.approx(-0.117, rel=0.2)
    sketched, spread = bias("turboquant:bits=2,sketch=true", 60)
    assert abs(sketched) < 4 * spread < 0.04


@pytest.mark.parametrize(
    ("options", "per_value"),
    [
        ("bits=4", 4.125),
        ("bits=3", 3.125),
        ("bits=2", 2.125),
        ("bits=2,metadata_dtype=float32", 2.25),
        ("bits=3,sketch=true", 3.1875),
        ("k_bits=4,v_bits=2", 3.125),
    ],
)
def test_bits_a_value(options, per_value):
    """Codes and a norm a token and head; a second one for sketched keys."""
    heads, dim, tokens = 8, 128, 512
    spec = kvc.parse(f"turboquant:{options}").spec(max_len=tokens, head_dim=dim)
    cache = jax.eval_shape(lambda: kvc.init(spec, batch=1, num_kv_heads=heads, head_dim=dim, dtype=jnp.bfloat16))
    (tier,) = cache.tiers
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((tier.k, tier.v)))
    assert stored * 8 / (2 * heads * tokens * dim) == per_value


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("turboquant:bits=3,block_size=32", marks=pytest.mark.slow),
        "turboquant:bits=2,sketch=true,block_size=32",
    ],
)
def test_a_step_attends_to_what_the_codec_makes_of_settled_tokens(text):
    q, k, v = qkv(4, 1, 65, heads=(4, 2))
    cache = make(text, batch=1, num_kv_heads=2, max_len=96)
    _, cache = prefill(cache, q[:, :40], k[:, :40], v[:, :40])
    _, cache = decode_many(cache, q[:, 40:64], k[:, 40:64], v[:, 40:64])
    cache = kvc.settle(cache)
    assert int(cache.settled[0]) == 64
    out, _ = decode_many(cache, q[:, 64:], k[:, 64:], v[:, 64:])
    coded = lambda codec, x: decoded(codec, encode(codec, x[:, :64].swapaxes(1, 2), None), None).swapaxes(1, 2)
    k_hat = jnp.concatenate([coded(cache.tiers[0].k_codec, k), k[:, 64:]], 1)
    v_hat = jnp.concatenate([coded(cache.tiers[0].v_codec, v), v[:, 64:]], 1)
    np.testing.assert_allclose(out[:, 0], kvc.causal_attention(q, k_hat, v_hat)[:, 64], atol=3e-5)


def test_a_read_turns_queries_and_results_and_no_key():
    """The rotated basis is that of the rows: the reader's products are with the codebook's own values."""
    codec = kvc.parse("turboquant").spec(max_len=64, head_dim=HEAD_DIM).rungs[0].k
    assert isinstance(codec.stored, Codebook)
    q, x = normal(1, 2, 5, HEAD_DIM), normal(2, 2, 16, HEAD_DIM)
    enc = encode(codec, x, None)
    np.testing.assert_allclose(codec.stored.dot(codec.enter(q), enc, None), codec.dot(q, enc, None), atol=1e-5)
    (rung,) = kvc.kernels_in_use(make("turboquant", batch=1, num_kv_heads=2, max_len=64))
    assert rung.codecs == ("Rotated(Rotated(Codebook))", "Rotated(Rotated(Codebook))")


@pytest.mark.parametrize(
    ("text", "head_dim", "words"),
    [
        ("turboquant:bits=5", 64, "bits=5 must be one of 2, 3, 4"),
        ("turboquant:v_bits=8", 64, "bits=8 must be one of 2, 3, 4"),
        ("turboquant", 50, "dim=50 has no Hadamard matrix"),
        ("turboquant:bits=3,block_size=16", 64, "block_size=16 must be a multiple of 32"),
        ("turboquant", 2, "dim=2 must be at least 3"),
        ("turboquant:rotations=0", 64, "rotations=0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(text, head_dim, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=64, head_dim=head_dim)
