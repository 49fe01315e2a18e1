"""ZeroC: which directions are kept, what dropping others costs, ranks by energy, bytes, and what reads it."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.calibrate import About, Activations, save
from kvcomp_jax.codecs import Identity, LowRank
from kvcomp_jax.methods.zeroc import calibrate, rank_for
from kvcomp_jax.types import Constant
from tests.laws.parts import CALIBRATIONS, HEAD_DIM, ROPE, ZEROC, decode_many, first_rows, make, normal, prefill, qkv
from tests.methods.fused import assert_read_is_fused

HEADS, GROUPS = 2, 3
LAYOUT = kvc.Layout(num_layers=1, num_kv_heads=HEADS, head_dim=HEAD_DIM, ropes=(ROPE,), calibrations=str(CALIBRATIONS))


def layer(seed=0, rope=ROPE, tokens=40):
    """Two samples of a layer, whose channels differ in spread and whose output projection has 24 outputs."""
    draw = np.random.default_rng(seed).standard_normal
    loud = np.exp(-np.arange(HEAD_DIM) / 12)
    k, v = (draw((2, tokens, HEADS, HEAD_DIM)) * loud for _ in range(2))
    q = draw((2, tokens, HEADS * GROUPS, HEAD_DIM)) * HEAD_DIM**-0.5
    return Activations(k, v, k, v, q, rope, draw((24, HEADS * GROUPS * HEAD_DIM)))


def rotated(x):
    """x [N, T, H, D] to positions 0 .. T - 1, in pairs (i, i + n) of the first 2n dimensions, by the definition."""
    frequency = ROPE.inv_freq.value.astype(np.float64)
    angle = np.arange(x.shape[1])[:, None, None] * frequency
    cos, sin, n = np.cos(angle) * ROPE.scale, np.sin(angle) * ROPE.scale, len(frequency)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


# 1. The whole rank loses nothing.


def test_the_whole_rank_is_the_uncompressed_cache():
    q, k, v = qkv(0, 2, 90, heads=(6, 2))
    outs = []
    for text in (f"{ZEROC},rank={HEAD_DIM}", "full"):
        cache = make(text, batch=2, num_kv_heads=HEADS, max_len=128)
        first, cache = prefill(cache, q[:, :70], k[:, :70], v[:, :70], jnp.array([70, 40]))
        later, _ = decode_many(cache, q[:, 70:], k[:, 70:], v[:, 70:])
        outs.append((first, later))
    chex.assert_trees_all_close(*outs, atol=2e-5)


# 2. Directions are orthonormal, ordered, and singular vectors of what is stacked.


@pytest.mark.parametrize("head", range(HEADS))
def test_directions_are_the_right_singular_vectors_of_what_heads_multiply(head):
    given = layer()
    made = calibrate(given)
    mine = slice(head * GROUPS, (head + 1) * GROUPS)
    queries = rotated(given.q)[:, :, mine].reshape(-1, HEAD_DIM) * HEAD_DIM**0.5
    keys = rotated(given.k)[:, :, head].reshape(-1, HEAD_DIM)
    values = given.v[:, :, head].reshape(-1, HEAD_DIM)
    projection = given.o_weight.reshape(24, HEADS * GROUPS, HEAD_DIM)[:, mine].reshape(-1, HEAD_DIM)
    for kind, rows in (("k", [queries, *[keys] * GROUPS]), ("v", [*[values] * GROUPS, projection])):
        _, singular, turned = np.linalg.svd(np.concatenate(rows), full_matrices=False)
        basis, energy = made[f"{kind}_basis"][head], made[f"{kind}_energy"][head]
        np.testing.assert_allclose(basis.T @ basis, np.eye(HEAD_DIM), atol=1e-5)
        np.testing.assert_allclose(energy, singular**2, rtol=1e-3)
        assert (np.diff(energy) <= 0).all()
        np.testing.assert_allclose(np.abs((turned @ basis).diagonal()), 1, atol=1e-3)


def test_models_without_rotation_are_calibrated_as_they_are():
    plain = layer(rope=None)
    keys = plain.k[:, :, 0].reshape(-1, HEAD_DIM)
    queries = plain.q[:, :, :GROUPS].reshape(-1, HEAD_DIM) * HEAD_DIM**0.5
    total = (GROUPS * keys**2).sum() + (queries**2).sum()
    assert calibrate(plain)["k_energy"][0].sum() == pytest.approx(total, rel=1e-4)


def test_activations_without_queries_or_projection_are_refused():
    for field in ("q", "o_weight"):
        with pytest.raises(ValueError, match="do not tell what keys and values meet"):
            calibrate(layer()._replace(**{field: None}))


# 4. What truncation costs.


def test_the_error_of_scores_is_the_product_of_the_dropped_coefficients():
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((1, HEAD_DIM, HEAD_DIM)))[0].astype(np.float32)
    codec = LowRank(inner=Identity(dtype="float32"), basis=Constant(basis[..., :32]))
    q, k, pos = normal(1, 1, 1, 3, HEAD_DIM), normal(2, 1, 1, 20, HEAD_DIM), jnp.zeros((1, 1, 20), jnp.int32)
    lost = np.asarray(q @ k.mT) - np.asarray(codec.dot(q, codec.encode(k, pos), pos))
    rest = basis[..., 32:]
    np.testing.assert_allclose(lost, (np.asarray(q) @ rest) @ (np.asarray(k) @ rest).swapaxes(-1, -2), atol=2e-5)


# 5. Arrays have the extent of the rank, and bytes are those of the paper's formula.


def test_arrays_have_the_extent_of_the_rank():
    cache = make(f"{ZEROC},k_rank=32,v_rank=48", batch=3, num_kv_heads=HEADS, max_len=128, dtype=jnp.bfloat16)
    tier = cache.tiers[0]
    assert (tier.k.shape, tier.v.shape) == ((3, HEADS, 128, 32), (3, HEADS, 128, 48))
    assert (tier.k_codec.held.shape, tier.v_codec.held.shape) == ((3, HEADS, 64, 32), (3, HEADS, 64, 48))
    packed = make(f"{ZEROC},rank=32,bits=4", batch=3, num_kv_heads=HEADS, max_len=128).tiers[0].k
    assert packed.codes.shape == (3, HEADS, 128 * 4 // 32, 32)
    assert packed.scale.shape == (3, HEADS, 128 // 32, 32)


def test_bytes_of_llama_3_8b(tmp_path):
    """Half of 131072 bytes a token, and bases of 4 MiB at 2 bytes an element, here 4."""
    layout = kvc.Layout(num_layers=32, num_kv_heads=8, head_dim=128, num_heads=32)
    basis = np.broadcast_to(np.eye(128, dtype=np.float32), (32, 8, 128, 128))
    tables = {f"{kind}_basis": basis for kind in "kv"} | {f"{kind}_energy": basis[..., 0] for kind in "kv"}
    save(tmp_path / "c.safetensors", tables, About("zeroc", {}, "x"))
    held = {}
    for ranks in ("rank=64", "k_rank=48,v_rank=80", "k_rank=64"):
        plan = kvc.parse(f"zeroc:{ranks},calibration={tmp_path / 'c.safetensors'}").plan(layout, max_len=1024)
        held[ranks] = [kvc.forecast(plan, [n], jnp.bfloat16).used for n in (512, 1024)]
    for ranks in ("rank=64", "k_rank=48,v_rank=80"):
        assert held[ranks][1] - held[ranks][0] == 512 * 65536
    assert held["rank=64"][0] - 512 * 65536 == pytest.approx(2 * 2 * 4 * 2**20, rel=1e-3)  # bases of K and of V
    assert held["k_rank=64"][1] - held["k_rank=64"][0] == 512 * 2 * 32 * 8 * (64 + 16)  # energy in one direction


@pytest.mark.parametrize("options", ["k_rank=32,v_rank=48", "rank=32,bits=4,num_sinks=2"])
def test_forecasts_equal_the_real_caches(options):
    lengths = [90, 33]
    plan = kvc.parse(f"{ZEROC},{options}").plan(LAYOUT, max_len=100, prompt_len=90)
    (cache,) = plan.init(batch=2, dtype=jnp.float32, prompt_lens=lengths)
    _, cache = prefill(cache, *qkv(12, 2, 90), jnp.array(lengths))
    assert kvc.forecast(plan, lengths, jnp.float32) == kvc.nbytes(cache)


# 6. Decoding continues a prompt as if it had been longer.


def test_decoding_after_a_prompt_equals_one_prompt_of_all():
    text = f"{ZEROC},k_rank=32,v_rank=48,prefill=stored"
    q, k, v = qkv(3, 1, 96, heads=(6, 2))

    def empty():
        return make(text, batch=1, num_kv_heads=HEADS, max_len=128)

    whole, at_once = prefill(empty(), q, k, v, jnp.array([96]))
    start, cache = prefill(empty(), q[:, :64], k[:, :64], v[:, :64], jnp.array([64]))
    later, cache = decode_many(cache, q[:, 64:], k[:, 64:], v[:, 64:])
    chex.assert_trees_all_close(jnp.concatenate([start, later], 1), whole, atol=2e-5)
    chex.assert_trees_all_close(*(first_rows(x.tiers[0], 96) for x in (cache, at_once)), atol=1e-5)


# 8. Ranks by energy.


def test_ranks_grow_with_the_share_of_energy_in_steps_of_16():
    energy = np.sort(np.random.default_rng(0).exponential(size=(3, 128)) ** 3)[:, ::-1].astype(np.float32)
    shares = np.linspace(0.01, 1, 60)
    ranks = [rank_for(energy, share) for share in shares]
    assert ranks == sorted(ranks)
    assert (ranks[0], ranks[-1]) == (16, 128)
    for share, rank in zip(shares, ranks, strict=True):
        kept = np.cumsum(energy.astype(np.float64), -1) / energy.sum(-1, dtype=np.float64, keepdims=True)
        assert rank % 16 == 0
        assert (kept[:, rank - 1] >= share - 1e-12).all()
        assert rank == 16 or (kept[:, rank - 17] < share).any()
    assert rank_for(np.zeros((2, 32), np.float32), 0.9) == 16


def test_each_layer_takes_the_rank_of_its_hungriest_head(tmp_path):
    energy = np.full((2, HEADS, HEAD_DIM), 1e-6, np.float32)
    energy[0, 0, :10], energy[0, 1, :20], energy[1, :, :40] = 1, 1, 1
    basis = np.broadcast_to(np.eye(HEAD_DIM, dtype=np.float32), (2, HEADS, HEAD_DIM, HEAD_DIM))
    file = tmp_path / "c.safetensors"
    save(
        file, {f"{k}_{n}": x for k in "kv" for n, x in (("basis", basis), ("energy", energy))}, About("zeroc", {}, "x")
    )
    layout = dataclasses.replace(LAYOUT, num_layers=2, ropes=(ROPE,) * 2)
    plan = kvc.parse(f"zeroc:k_energy=0.99,v_energy=0.5,calibration={file}").plan(layout, max_len=64)
    ranks = [(spec.rungs[0].k.rank, spec.rungs[0].v.rank) for spec in plan.specs]
    assert ranks == [(32, 16), (48, 32)]


# What reads it.


@pytest.mark.parametrize("options", ["k_rank=32,v_rank=48", "k_rank=48,v_rank=16,bits=4,num_sinks=3"])
def test_a_decode_step_reads_coefficients_by_the_kernel_for_them(options):
    rung, _ = assert_read_is_fused(f"{ZEROC},{options}", "low_rank_decode")
    assert rung.codecs[0] == f"LowRank({'Affine' if 'bits' in options else 'Identity'})"


@pytest.mark.parametrize(
    "text",
    ["h2o:budget=160", "quest:budget=160,page_size=16,full_layers=0", "arkvale:budget=160,page_size=16,full_layers=0"],
)
def test_policies_that_want_probabilities_and_queries_that_choose_pages_read_it_too(text):
    """With a budget for all tokens and the whole rank of keys: what values lose is their projection's."""
    q, k, v = qkv(5, 1, 130, heads=(4, 2))
    outs, window = [], 0
    for method in (f"{text}+{ZEROC},k_rank=64,v_rank=16", f"{ZEROC},k_rank=64,v_rank=16,block_size=16,window="):
        cache = make(method + str(window) * method.endswith("="), batch=1, num_kv_heads=HEADS, max_len=160)
        window = cache.spec.window
        _, cache = prefill(cache, q[:, :128], k[:, :128], v[:, :128], jnp.array([128]))
        outs.append(decode_many(cache, q[:, 128:], k[:, 128:], v[:, 128:])[0])
    chex.assert_trees_all_close(*outs, atol=2e-5)


# What is refused.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("rank=24", "rank=24 must be a multiple of 16, at most head_dim=64"),
        ("rank=32,v_rank=80", "v_rank=80 must be"),
        ("k_energy=0.0", "k_energy=0.0 is a share"),
        ("v_energy=1.5", "v_energy=1.5 is a share"),
        ("prefill=low", "prefill='low' must be 'exact' or 'stored'"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(f"{ZEROC},{options}").plan(LAYOUT, max_len=64)


def test_other_models_calibrations_are_refused():
    with pytest.raises(ValueError, match="the calibration is of heads and channels"):
        kvc.parse(ZEROC).plan(dataclasses.replace(LAYOUT, head_dim=32), max_len=64)


def test_heads_that_share_slots_cannot_keep_a_basis_each():
    with pytest.raises(ValueError, match="heads that share slots"):
        make(f"ada_kv:budget=120,window=16+{ZEROC},rank=32", batch=1, num_kv_heads=HEADS, max_len=136)


@pytest.mark.parametrize(
    ("basis", "words"),
    [
        (np.ones((2, 64, 16)), "must be orthonormal"),
        (np.full((2, 64, 16), np.nan), "must be orthonormal"),
        (np.eye(64)[None, :, :24], "a multiple of 16"),
        (np.eye(64), "a multiple of 16"),
    ],
)
def test_impossible_bases_are_refused(basis, words):
    with pytest.raises(ValueError, match=words):
        LowRank(inner=Identity(), basis=Constant(basis.astype(np.float32)))


def test_a_basis_of_another_head_dim_is_refused():
    codec = LowRank(inner=Identity(), basis=Constant(np.eye(64, 16, dtype=np.float32)[None]))
    with pytest.raises(ValueError, match="a basis of 64 channels does not fit head_dim=32"):
        codec.check(32, 16)
