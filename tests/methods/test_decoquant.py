"""Faithfulness of DecoQuant: exact factors, their gauge, errors, bytes, what stays exact."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.codecs import Affine, TensorTrain
from kvcomp_jax.codecs.tensor_train import factor
from tests.laws.parts import HEAD_DIM, decode, decoded, encode, make, normal, prefill, qkv, settle


def product(large, small):
    """L M of every run, in float64: [P, D] from [P, D] and [bases, r, r]."""
    large, small = np.asarray(large, np.float64), np.asarray(small, np.float64)
    bases, rank, _ = small.shape
    runs = large.reshape(len(large), bases, -1, rank)
    return np.einsum("pnci,nij->pncj", runs, small).reshape(large.shape)


def relative_error(x, y, channels=slice(None)):
    x, y = (np.asarray(a, np.float64)[..., channels] for a in (x, y))
    return np.linalg.norm(y - x) / np.linalg.norm(x)


def outliers(every=16):
    """512 tokens of 1024 channels, every 16th of them twentyfold."""
    return normal(0, 512, 1024).at[:, ::every].mul(20)


@pytest.mark.parametrize("basis", ["shared", "run"])
@pytest.mark.parametrize(
    ("tokens", "dim", "rank"), [(16, 16, 16), (32, 64, 1), (40, 64, 8), (64, 48, 16), (128, 96, 32)]
)
def test_factors_multiply_to_the_rows(tokens, dim, rank, basis):
    for x in (
        normal(1, tokens, dim),
        normal(1, tokens, dim) * 1e4,
        normal(1, tokens, dim).at[:, 1:].set(0.0),
        normal(2, tokens, 1) * normal(3, 1, dim) + 1e-4 * normal(4, tokens, dim),  # almost of rank 1
    ):
        assert relative_error(x, product(*factor(x, rank, basis))) < 1e-5


def test_zeros_stay_zeros():
    codec = TensorTrain(large=Affine(bits=4, axis="token", symmetric=True), block_size=32)
    x = jnp.zeros((1, 2, 64, HEAD_DIM))
    pos = jnp.zeros((1, 2, 64), jnp.int32)
    np.testing.assert_array_equal(decoded(codec, encode(codec, x, pos), pos), 0)


@pytest.mark.parametrize("basis", ["shared", "run"])
def test_the_gauge_is_balanced(basis):
    """L^T L and M M^T are the same diagonal matrix: the singular values, as numpy has them."""
    x = normal(5, 128, 64).at[:, ::16].mul(7)
    large, small = (np.asarray(a, np.float64) for a in factor(x, 16, basis))
    runs = np.asarray(x, np.float64).reshape(128, len(small), -1, 16)
    for i, m in enumerate(small):
        s = np.sort(np.linalg.svd(runs[:, i].reshape(-1, 16), compute_uv=False))
        of_basis = large.reshape(128, len(small), -1, 16)[:, i].reshape(-1, 16)
        np.testing.assert_allclose(m @ m.T, np.diag(s), atol=1e-4 * s[-1])
        np.testing.assert_allclose(of_basis.T @ of_basis, np.diag(s), atol=1e-4 * s[-1])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_large_factor_errs_by_half_a_step(bits):
    """And the rows by what the small factor makes of that."""
    x = outliers()[:64, :HEAD_DIM]
    codec = TensorTrain(
        large=Affine(bits=bits, axis="token", symmetric=True, metadata_dtype="float32"),
        block_size=64,
        dtype="float32",
    )
    enc = encode(codec, x, None)
    large, small = factor(x, 16)
    coded = decoded(codec.large, enc.large, None)
    assert bool((jnp.abs(coded - large) <= enc.large.scale / 2 * (1 + 1e-5) + 1e-6).all())
    levels = 2 ** (bits - 1) - 1
    np.testing.assert_allclose(enc.large.scale[:, 0], jnp.abs(large).max(-1) / levels, rtol=1e-6)
    error = np.asarray(decoded(codec, enc, None) - x, np.float64)
    np.testing.assert_allclose(error, product(coded - large, small), atol=1e-4)


@pytest.mark.parametrize("basis", ["shared", "run"])
def test_products_with_the_factors_are_those_with_the_rows(basis):
    codec = TensorTrain(large=Affine(bits=4, axis="token", symmetric=True), block_size=32, basis=basis)
    x, q, p = normal(6, 2, 3, 96, HEAD_DIM), normal(7, 2, 3, 4, HEAD_DIM), normal(8, 2, 3, 4, 96)
    pos = jnp.broadcast_to(jnp.arange(96), (2, 3, 96))
    enc = encode(codec, x, pos)
    back = np.asarray(decoded(codec, enc, pos), np.float64)
    chex.assert_trees_all_close(codec.dot(q, enc, pos), np.asarray(q, np.float64) @ back.swapaxes(-1, -2), atol=1e-4)
    chex.assert_trees_all_close(codec.mix(p, enc, pos), np.asarray(p, np.float64) @ back, atol=1e-4)


def errors(x, bits, basis="shared"):
    """Relative error of a block of 512 tokens, and that of rounding its rows per token."""
    plain = Affine(bits=bits, axis="token", symmetric=True)
    codec = TensorTrain(large=plain, block_size=512, basis=basis)
    return [relative_error(x, decoded(c, encode(c, x, None), None)) for c in (codec, plain)]


def test_outliers_at_the_same_place_of_every_run_go_to_the_small_factor():
    factored, plain = errors(outliers(), 8)
    assert plain / factored > 2.5
    assert factored == pytest.approx(0.0078, rel=0.05)
    assert plain == pytest.approx(0.0235, rel=0.05)


def test_gaussian_rows_gain_nothing():
    factored, plain = errors(normal(0, 512, 1024), 4)
    assert factored == pytest.approx(plain, rel=0.01)


def test_a_basis_a_run_helps_with_outliers_anywhere():
    x = normal(0, 512, 1024)
    x = x.at[:, np.random.default_rng(1).choice(1024, 8, replace=False)].mul(20)
    shared, own = (errors(x, 4, basis)[0] for basis in ("shared", "run"))
    assert own < 0.7 * shared


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ("across_heads=true,block_size=4096", 4.0166),  # the original's layout
        ("across_heads=true", 4 + 16 / 1024 + 16 * 256 / (256 * 1024)),
        ("block_size=256", 4 + 16 / 128 + 16 * 256 / (256 * 128)),
        ("block_size=4096,basis=run", 4 + 16 / 128 + 16 * 16 / 4096),
    ],
)
def test_bytes_of_the_papers_example(options, bits):
    tokens, heads, dim = 4096, 8, 128
    spec = kvc.parse(f"decoquant:{options}").spec(max_len=tokens, head_dim=dim, num_kv_heads=heads)
    cache = jax.eval_shape(lambda: kvc.init(spec, batch=1, num_kv_heads=heads, head_dim=dim, dtype=jnp.bfloat16))
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.tiers[0].k, cache.tiers[0].v)))
    assert 8 * stored / (2 * heads * dim * tokens) == pytest.approx(bits, abs=1e-4)


@pytest.mark.slow
def test_what_waits_for_its_block_is_exact():
    """The prompt's remainder and decoded tokens, bit for bit; then a block of them is factored at once."""
    q, k, v = qkv(9, 2, 150)
    cache = make("decoquant:block_size=64", batch=2, num_kv_heads=2, max_len=200)
    _, cache = prefill(cache, q[:, :90], k[:, :90], v[:, :90], jnp.array([90, 30]))
    np.testing.assert_array_equal(cache.settled, [64, 0])
    for t in range(90, 124):
        _, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        cache = settle(cache)
        settled = int(cache.settled[0])
        assert settled == (64 if t < 127 else 128)
        slots = np.arange(settled, t + 1) % cache.spec.window_slots
        np.testing.assert_array_equal(cache.window.k[0, :, slots], k[0, settled : t + 1])
    np.testing.assert_array_equal(cache.settled, [64, 64])
    np.testing.assert_array_equal(cache.length - cache.settled, [60, 0])


def test_decoded_blocks_have_the_factors_of_a_prompt():
    q, k, v = qkv(10, 1, 128)
    streamed, whole = (make("decoquant:block_size=64", batch=1, num_kv_heads=2, max_len=128) for _ in range(2))
    _, streamed = prefill(streamed, q[:, :64], k[:, :64], v[:, :64])
    for t in range(64, 128):
        _, streamed = decode(streamed, *(x[:, t : t + 1] for x in (q, k, v)))
    streamed = settle(streamed)
    _, whole = prefill(whole, q, k, v)
    (a,), (b,) = streamed.tiers, whole.tiers
    pos = jnp.broadcast_to(jnp.arange(128), (1, 2, 128))
    chex.assert_trees_all_close(decoded(a.k_codec, a.k, pos), decoded(b.k_codec, b.k, pos), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("decoquant:rank=24", "rank=24 must divide head_dim=64"),
        ("decoquant:rank=0", "rank=0 and block_size=256 of a TensorTrain must be positive"),
        ("decoquant:basis=run,block_size=8,bits=4", "rank=16 must not exceed 8, the runs of block_size=8 tokens"),
        ("decoquant:block_size=20", "block_size=20 must be a multiple of 8"),
        ("decoquant:basis=head", "basis='head' must be 'shared' or 'run'"),
    ],
)
def test_impossible_options_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=400, head_dim=HEAD_DIM)
