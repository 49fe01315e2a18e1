"""Faithfulness of KVQuant: what is coded, what is kept beside it, what is read, and bytes."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.calibrate import About, Activations, load, nearest_levels, restore_moments, save
from kvcomp_jax.codecs import AcrossHeads, Codebook, Outliers, PerChannel, PreRope
from kvcomp_jax.methods.kvquant import calibrate, per_side
from kvcomp_jax.types import Constant
from pallas_kernels.packing import unpack
from tests.laws.parts import (
    CALIBRATIONS,
    HEAD_DIM,
    KVQUANT_2,
    KVQUANT_3,
    ROPE,
    decode_many,
    decoded,
    encode,
    make,
    normal,
    prefill,
    qkv,
)
from tests.methods.fused import assert_read_is_fused

HEADS, CHANNELS = 2, 2 * HEAD_DIM
LAYOUT = kvc.Layout(num_layers=1, num_kv_heads=HEADS, head_dim=HEAD_DIM, ropes=(ROPE,), calibrations=str(CALIBRATIONS))


def rung(text=KVQUANT_3, layout=LAYOUT):
    return kvc.parse(text).plan(layout, max_len=64).specs[0].rungs[0]


def rotate(x, pos):
    """Half-split rotation in float64: x [..., S, D], pos [S]."""
    x, freq = np.asarray(x, np.float64), np.asarray(ROPE.inv_freq.value, np.float64)
    n = len(freq)
    angle = np.asarray(pos)[:, None] * freq
    cos, sin = np.cos(angle) * ROPE.scale, np.sin(angle) * ROPE.scale
    a, b = x[..., :n], x[..., n : 2 * n]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * n :]], -1)


def at(first, num=64):
    return jnp.broadcast_to(first + jnp.arange(num), (1, HEADS, num))


def parts_of(k):
    """The codecs inside that of the keys: (PerChannel, Outliers, Codebook)."""
    assert isinstance(k, PreRope)
    assert isinstance(k.inner, PerChannel)
    assert isinstance(k.inner.inner, AcrossHeads)
    outliers = k.inner.inner.inner
    assert isinstance(outliers, Outliers)
    assert isinstance(outliers.inner, Codebook)
    return k.inner, outliers, outliers.inner


# 1. Keys are quantised before their rotation.


def test_codes_of_keys_do_not_depend_on_where_they_stand():
    k, before = rung().k, normal(0, 1, HEADS, 64, HEAD_DIM)
    units, _, book = parts_of(k)
    z = (np.asarray(before) - units.zero_point.value[:, None]) / units.scale.value[:, None]
    levels = book.levels.value
    near = np.abs(z[..., None] - (levels[1:] + levels[:-1]) / 2).min(-1) < 1e-4  # where rounding may decide
    assert near.mean() < 0.01
    codes = []
    for first in (0, 3, 900):
        enc = encode(k, jnp.asarray(rotate(before, first + np.arange(64)), jnp.float32), at(first))
        codes.append(np.asarray(unpack(enc.dense.codes, book.bits)).reshape(64, HEADS, HEAD_DIM).swapaxes(0, 1))
    inside = (np.abs(z) < 0.9) & ~near
    assert inside.mean() > 0.8
    for found in codes:
        np.testing.assert_array_equal(found[inside[0]], nearest_levels(z, levels)[inside])


def test_stored_keys_move_to_other_positions_as_they_are():
    k = rung().k
    enc = encode(k, normal(1, 1, HEADS, 64, HEAD_DIM), at(0))
    here, there = decoded(k, enc, at(0)), decoded(k, enc, at(700))
    plain = ROPE.undo(here, at(0))
    np.testing.assert_allclose(there, rotate(plain, 700 + np.arange(64)), atol=2e-3)


# 2. Thresholds of keys are the same for all tokens, those of values depend on their token alone.


def test_a_token_is_stored_alike_in_any_company():
    r = rung()
    pos = at(5)
    x = normal(2, 1, HEADS, 64, HEAD_DIM)
    other = x.at[:, :, 7].mul(50.0)
    for codec in (r.k, r.v):
        a, b = (decoded(codec, encode(codec, y, pos), pos) for y in (x, other))
        rest = np.delete(np.arange(64), 7)
        chex.assert_trees_all_equal(a[:, :, rest], b[:, :, rest])
        assert not bool(jnp.allclose(a[:, :, 7], b[:, :, 7], atol=1.0))


def test_ranges_of_keys_are_the_calibrations():
    tensors, _ = load(CALIBRATIONS / "kvquant_3.safetensors")
    units, outliers, book = parts_of(rung().k)
    np.testing.assert_array_equal(units.scale.value, tensors["k_scale"][0])
    np.testing.assert_array_equal(units.zero_point.value, tensors["k_zero_point"][0])
    np.testing.assert_array_equal(book.levels.value, tensors["k_levels"][0])
    assert book.normalise == "none"  # nothing is taken from the tokens
    assert outliers.num_outliers == 2 * per_side(0.01, CHANNELS)


@pytest.mark.parametrize("across_heads", [True, False])
def test_ranges_hold_all_that_is_not_among_the_outliers_of_its_token(across_heads):
    layer = _layer(9)
    k = layer.k.copy()
    k[0, 5::7, :, 2] *= 40.0  # loud in one token of seven: more than the share of outliers
    tables = calibrate(layer._replace(k=k), bits=3, outliers=0.05, across_heads=across_heads)
    x = k[:, 1:].reshape(-1, *k.shape[2:])
    low, high = np.quantile(x, (0.025, 0.975), axis=0)
    z = (x - (low + high) / 2) / (high - low)
    kept = [[[] for _ in range(x.shape[2])] for _ in range(x.shape[1])]
    for token, units in zip(x, z, strict=True):
        groups = [range(units.size)] if across_heads else np.arange(units.size).reshape(units.shape)
        for group in groups:
            cut = int(0.025 * len(group)) + 1
            for at in sorted(group, key=lambda i: units.flat[i])[cut:-cut]:
                kept[at // x.shape[2]][at % x.shape[2]].append(token.flat[at])
    ends = np.array([[(min(channel), max(channel)) for channel in head] for head in kept])
    np.testing.assert_allclose(tables["k_zero_point"], ends.mean(-1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tables["k_scale"], np.diff(ends)[..., 0] / 2, rtol=1e-4)


# 3. Exactly n upper and n lower outliers of each token of values, also among equal values, and they come back.


@pytest.mark.parametrize("kind", ["normal", "all equal", "two values"])
def test_outliers_are_exactly_as_many_and_come_back(kind):
    codec = rung(KVQUANT_2).v  # heads alone: rows of 64, two on each side
    half = codec.num_outliers // 2
    x = {
        "normal": normal(3, 1, HEADS, 64, HEAD_DIM) * 3,
        "all equal": jnp.full((1, HEADS, 64, HEAD_DIM), 1.5),
        "two values": jnp.where(normal(4, 1, HEADS, 64, HEAD_DIM) > 0, 2.0, -1.0),
    }[kind]
    enc = encode(codec, x, at(0))
    index = np.asarray(enc.channels)
    assert all(len(set(row)) == 2 * half for row in index.reshape(-1, 2 * half))
    back = np.take_along_axis(np.asarray(decoded(codec, enc, at(0))), index.astype(int), -1)
    np.testing.assert_allclose(back, np.take_along_axis(np.asarray(x), index.astype(int), -1), rtol=2e-3, atol=2e-3)
    rest = np.asarray(x).copy()
    np.put_along_axis(rest, index.astype(int), np.nan, -1)
    picked = np.take_along_axis(np.asarray(x), index.astype(int), -1)
    assert (picked[..., :half].min(-1) >= np.nanmax(rest, -1)).all()
    assert (picked[..., half:].max(-1) <= np.nanmin(rest, -1)).all()


def test_ranges_of_values_are_those_of_the_rest():
    codec = rung(KVQUANT_2).v
    x = normal(5, 1, HEADS, 64, HEAD_DIM).at[..., 3].mul(100.0)
    enc = encode(codec, x, at(0))
    half = codec.num_outliers // 2
    ordered = np.sort(np.asarray(x), -1)
    high, low = ordered[..., -1 - half], ordered[..., half]
    np.testing.assert_allclose(enc.dense.scale, (high - low) / 2, rtol=1e-3)
    np.testing.assert_allclose(enc.dense.zero_point, (high + low) / 2, rtol=1e-3, atol=1e-3)


# 4. Without Q-Norm, values within their range are off by the largest half gap, or the way from the range to its end.


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_bounded_by_the_levels(bits):
    levels = calibrate(_layer(6), bits=bits)
    k, v = _codecs(levels, bits, corrected=False)
    bound = _bound(levels["k_levels"])
    x = normal(7, 1, HEADS, 64, HEAD_DIM)
    z = (np.asarray(x) - levels["k_zero_point"][:, None]) / levels["k_scale"][:, None]
    error = np.abs(np.asarray(decoded(k, encode(k, x, at(0)), at(0))) - np.asarray(x)) / levels["k_scale"][:, None]
    assert (error[np.abs(z) <= 1] <= bound + 1e-5).all()
    assert error[np.abs(z) <= 1].max() > bound / 4
    enc = encode(v, x, at(0))
    error = np.abs(np.asarray(decoded(v, enc, at(0))) - np.asarray(x))
    scale = np.asarray(enc.dense.scale, np.float32)[..., None]  # [1, 1, S, 1], shared by the heads
    assert (error <= scale * (_bound(levels["v_levels"]) + 2e-3)).all()


def _bound(levels):
    return max(np.diff(levels).max() / 2, 1 - levels[-1], 1 + levels[0])


# 6. Q-Norm keeps mean and spread of what is within the range.


@pytest.mark.parametrize("bits", [2, 3])
def test_q_norm_restores_mean_and_spread(bits):
    layer = _layer(8)
    tables = calibrate(layer, bits=bits)
    z = (layer.k[:, 1:] - tables["k_zero_point"]) / tables["k_scale"]
    z = z[np.abs(z) <= 1]
    read = tables["k_values"][nearest_levels(z, tables["k_levels"])]
    assert read.mean() == pytest.approx(z.mean(), abs=1e-3)
    assert read.std() == pytest.approx(z.std(), abs=1e-3)
    plain = tables["k_levels"][nearest_levels(z, tables["k_levels"])]
    assert abs(plain.std() - z.std()) > 5e-3
    levels = np.array([-1.0, 0.0, 1.0, 2.0])
    np.testing.assert_allclose(restore_moments(levels, levels), levels, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3])
def test_q_norm_restores_mean_and_spread_of_values(bits):
    """Each token's values, its heads joined, are brought to -1 .. 1 once its outliers are cut."""
    layer = _layer(8)
    tables = calibrate(layer, bits=bits)
    cut = per_side(0.01, CHANNELS)
    rest = np.sort(layer.v[:, 1:].reshape(-1, CHANNELS), -1)[:, cut:-cut]
    low, high = rest[:, :1], rest[:, -1:]
    z = (2 * rest - low - high) / (high - low)
    codes = nearest_levels(z, tables["v_levels"])
    read, plain = tables["v_values"][codes], tables["v_levels"][codes]
    assert read.mean() == pytest.approx(z.mean(), abs=1e-3)
    assert read.std() == pytest.approx(z.std(), abs=1e-3)
    assert abs(plain.std() - z.std()) > 5e-3


def test_q_norm_is_on_at_2_bits_and_by_option():
    assert rung(KVQUANT_2).v.inner.values is not None
    assert parts_of(rung().k)[2].values is None
    assert parts_of(rung(KVQUANT_3 + ",q_norm=True").k)[2].values is not None
    assert rung(KVQUANT_2 + ",q_norm=False").v.inner.values is None


# 7. The first tokens stay exact.


def test_sinks_are_bit_exact():
    q, k, v = qkv(9, 2, 130, dtype=jnp.bfloat16)
    cache = make(KVQUANT_3, batch=2, num_kv_heads=2, max_len=130, dtype=jnp.bfloat16)
    _, cache = prefill(cache, q[:, :90], k[:, :90], v[:, :90])
    _, cache = decode_many(cache, q[:, 90:], k[:, 90:], v[:, 90:])
    chex.assert_trees_all_equal(cache.sinks.k, k[:, :1].swapaxes(1, 2))
    chex.assert_trees_all_equal(cache.sinks.v, v[:, :1].swapaxes(1, 2))
    assert int(cache.tiers[0].entered[0]) == 96


# 8. Scores of keys rotated as they are read.


@pytest.mark.parametrize("heads", [1, HEADS])
def test_scores_equal_those_of_decoded_and_rotated_keys(heads):
    k = rung().k
    x, pos = normal(10, 1, HEADS, 64, HEAD_DIM), at(1000)
    enc = encode(k, x, pos)
    before = np.asarray(decoded(k.inner, enc, pos), np.float64)
    q = normal(11, 1, HEADS, 3, HEAD_DIM)
    expected = np.asarray(q, np.float64) @ rotate(before, 1000 + np.arange(64)).swapaxes(-1, -2)
    np.testing.assert_allclose(k.dot(q, enc, pos[:, :heads]), expected, atol=1e-3)  # positions shared by heads, or not


# 9. Bytes.


@pytest.mark.parametrize(("bits", "expected"), [(2, 2.324), (3, 3.324), (4, 4.324)])
def test_bits_of_the_papers_example(tmp_path, bits, expected):
    """LLaMA-7B, 1 % of 4096 values of a token: 21 on each side, 16 bits and a channel of 16 bits each."""
    tokens, heads, dim = 4096, 32, 128
    plan = _plan(tmp_path, bits, heads, dim, tokens + 1)
    k, v = (c.size(tokens, heads, dim)[0] / (tokens * heads * dim) for c in _pair(plan))
    assert k == pytest.approx(bits + 42 * 32 / 4096)
    assert v == pytest.approx(bits + 42 * 32 / 4096 + 32 / 4096)
    assert (k + v) / 2 == pytest.approx(expected, abs=0.01)


def test_bits_of_llama_3_8b(tmp_path):
    plan = _plan(tmp_path, 3, 8, 128, 4097)
    k, v = (c.size(4096, 8, 128)[0] / (4096 * 1024) for c in _pair(plan))
    assert (k, v) == (3.375, 3.40625)


def test_forecasts_equal_the_real_caches():
    lengths = [90, 33]
    plan = kvc.parse(KVQUANT_3).plan(LAYOUT, max_len=100, prompt_len=90)
    (cache,) = plan.init(batch=2, dtype=jnp.float32, prompt_lens=lengths)
    q, k, v = qkv(12, 2, 90)
    _, cache = prefill(cache, q, k, v, jnp.array(lengths))
    assert kvc.forecast(plan, lengths, jnp.float32) == kvc.nbytes(cache)


# What composes, and bad input.


def test_policies_that_rank_by_head_need_heads_stored_alone():
    with pytest.raises(ValueError, match=r"HeavyHitter keeps different tokens in each head.*encode each head alone"):
        kvc.parse(f"h2o:budget=140+{KVQUANT_3}").plan(LAYOUT, max_len=300)


def test_models_without_rotation_store_keys_as_they_are():
    assert isinstance(rung(layout=dataclasses.replace(LAYOUT, ropes=())).k, PerChannel)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_alone(bad):
    r = rung()
    x = normal(13, 1, HEADS, 64, HEAD_DIM).at[0, 1, 5, 9].set(bad)
    for codec in (r.k.inner, r.v):
        back = np.asarray(decoded(codec, encode(codec, x, at(0)), at(0)))
        assert not np.isfinite(back[0, 1, 5, 9])
        assert np.isfinite(np.delete(back.reshape(-1), np.ravel_multi_index((0, 1, 5, 9), back.shape))).all()


def test_huge_outliers_saturate():
    codec = Outliers(inner=kvc.Affine(bits=4, axis="token"), num_outliers=2)
    x = normal(14, 1, 8, HEAD_DIM).at[0, 0, 0].set(1e9)
    assert bool(jnp.isfinite(decoded(codec, encode(codec, x, at(0)), at(0))).all())


@pytest.mark.parametrize(
    ("make_codec", "words"),
    [
        (lambda: Outliers(inner=kvc.Identity(), num_outliers=3), "num_outliers=3 must be even"),
        (lambda: Outliers(inner=kvc.Identity(), num_outliers=64).check(64, 32), "num_outliers=64 must be less than"),
        (lambda: _per_channel(np.zeros((2, 64))), "scale must be positive"),
        (lambda: _per_channel(np.ones((2, 64))).check(32, 32), "scales of 64 channels do not fit head_dim=32"),
        (lambda: PreRope(inner=kvc.Identity(), rope=ROPE).check(32, 32), "a rope of 48 dimensions does not fit"),
        (lambda: AcrossHeads(inner=kvc.Identity(), num_heads=3).encode(jnp.zeros((1, 2, 4, 8)), at(0, 4)), "2 heads"),
    ],
)
def test_impossible_codecs_are_refused(make_codec, words):
    with pytest.raises(ValueError, match=words):
        make_codec()


# 10. The fused read rotates keys as it reads them, and is what `dot` and `mix` are.


@pytest.mark.parametrize("text", [KVQUANT_3, KVQUANT_2])
def test_a_decode_step_reads_codes_through_the_fused_operation(text):
    rung, cache = assert_read_is_fused(text, "codebook_decode")
    assert rung.codecs[0].startswith("PreRope(PerChannel(")
    np.testing.assert_array_equal(cache.tiers[0].entered % 32, 0)


def test_wrappers_in_another_order_than_the_operations_are_read_without_it():
    units = rung().k.inner.prepare(1, HEADS, HEAD_DIM)  # as a cache has them, arrays

    def rows(codec):
        return codec.codebook_rows(encode(codec, normal(21, 1, HEADS, 64, HEAD_DIM), at(0)))

    assert rows(units) is not None
    assert rows(dataclasses.replace(units, units=None)) is None
    scale = {"scale": units.scale, "zero_point": units.zero_point, "units": units.units}
    assert rows(PerChannel(inner=units, **scale)) is None
    assert rows(Outliers(inner=units, num_outliers=2)) is None
    assert rows(Outliers(inner=Outliers(inner=kvc.Identity(), num_outliers=2), num_outliers=2)) is None
    assert rows(PreRope(inner=PreRope(inner=units, rope=ROPE), rope=ROPE)) is None


def _per_channel(scale):
    zero = Constant(np.zeros(scale.shape, np.float32))
    return PerChannel(inner=kvc.Identity(), scale=Constant(scale.astype(np.float32)), zero_point=zero)


def _layer(seed):
    draw = np.random.default_rng(seed).standard_normal
    shape = (2, 300, HEADS, HEAD_DIM)
    return Activations(
        draw(shape) * np.exp(draw((HEADS, HEAD_DIM))) + 1, draw(shape), draw(shape) ** 2, draw(shape) ** 2
    )


def _codecs(tables, bits, corrected):
    """Codecs of keys, not rotated, and of values."""
    books = {}
    for kind, normalise in (("k", "none"), ("v", "range")):
        values = Constant(tables[f"{kind}_values"]) if corrected else None
        book = Codebook(levels=Constant(tables[f"{kind}_levels"]), values=values, normalise=normalise)
        books[kind] = AcrossHeads(inner=Outliers(inner=book, num_outliers=2), num_heads=HEADS)
    scale, zero_point = Constant(tables["k_scale"]), Constant(tables["k_zero_point"])
    return PerChannel(inner=books["k"], scale=scale, zero_point=zero_point), books["v"]


def _plan(folder, bits, heads, dim, max_len):
    levels = np.linspace(-1, 1, 2**bits, dtype=np.float32)[None]
    ones = np.ones((1, heads, dim), np.float32)
    named = {f"{kind}_{name}": levels for kind in "kv" for name in ("levels", "values")}
    options = {"bits": bits, "outliers": 0.01, "num_sinks": 1, "across_heads": True}
    file = folder / "c.safetensors"
    save(file, {"k_scale": ones, "k_zero_point": ones, **named}, About("kvquant", options, "x"))
    layout = kvc.Layout(num_layers=1, num_kv_heads=heads, head_dim=dim)
    return kvc.parse(f"kvquant:bits={bits},calibration={file}").plan(layout, max_len=max_len)


def _pair(plan):
    return plan.specs[0].rungs[0].k, plan.specs[0].rungs[0].v
