"""Steps by sensitivity: what they are equal in, what codes they give, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.calibrate import About, Activations, save
from kvcomp_jax.codecs import Entropy, Stepped
from kvcomp_jax.methods.fisher_steps import calibrate, normal_bits
from tests.laws.parts import FISHER, HEAD_DIM, ROPE, make, normal, prefill, qkv

LAYERS, HEADS = 3, 2
quantise = jax.jit(lambda codec, x, stretch: codec.quantise(x, stretch))
encode = jax.jit(lambda codec, x: codec.encode(x, None))
decode = jax.jit(lambda codec, enc: codec.decode(enc, None))


@pytest.fixture(scope="module")
def tables():
    draw = np.random.default_rng(0)
    shape = (LAYERS, HEADS, HEAD_DIM)
    return {
        f"{kind}_{name}": (
            draw.standard_normal(shape) if name == "mean" else np.exp(draw.standard_normal(shape))
        ).astype(np.float32)
        for kind in "kv"
        for name in ("mean", "std", "weight")
    }


@pytest.fixture(scope="module")
def plan(tables, tmp_path_factory):
    file = tmp_path_factory.mktemp("c") / "c.safetensors"
    save(file, tables, About("fisher_steps", {"num_sinks": 4}, "x"))
    layout = kvc.Layout(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=HEAD_DIM, ropes=(ROPE,) * LAYERS)
    return kvc.parse(f"fisher_steps:k_step=0.5,v_step=0.25,calibration={file}").plan(layout, max_len=256)


def test_no_value_within_reach_is_off_by_more_than_half_a_step():
    codec, x = Stepped(step=0.1, group_size=32), normal(0, 2, 128, HEAD_DIM)
    error = np.abs(np.asarray(decode(codec, encode(codec, x))) - x)
    assert 0.049 < error.max() <= 0.05 * (1 + 2**-9)


def test_a_code_means_the_same_everywhere_unless_a_region_reaches_too_far():
    codec = Stepped(step=0.1, num_levels=128, group_size=32)
    x = normal(1, 1, 96, HEAD_DIM)
    far = x.at[:, 40, 3].set(-50.0)
    (codes, regions), (far_codes, far_regions) = (quantise(codec, y, 1.0) for y in (x, far))
    np.testing.assert_array_equal(regions.zero, 64)
    np.testing.assert_allclose(regions.scale, 0.1, rtol=1e-3)
    other = np.r_[:32, 64:96]
    np.testing.assert_array_equal(np.asarray(codes)[:, other], np.asarray(far_codes)[:, other])
    np.testing.assert_allclose(far_regions.scale.squeeze(), [0.1, 50 / 64, 0.1], rtol=2e-3)
    assert abs(float(decode(codec, encode(codec, far))[0, 40, 3]) + 50) < 0.1


@pytest.mark.parametrize("stretch", [1.0, 2.0, 4.0])
def test_a_stretch_leaves_so_many_fewer_codes_and_loses_nothing(stretch):
    codec = Stepped(step=0.02, num_levels=128, group_size=16)
    x = normal(2, 1, 64, HEAD_DIM) * jnp.array([0.1, 100.0])[:, None, None]
    codes, regions = quantise(codec, x, stretch)
    count = int(128 / stretch)
    assert np.asarray(codes).max() < count
    assert codec.stretch_for(count) <= stretch
    scale, zero_point = codec.grid(regions)
    back = np.asarray(codes, np.float32).reshape(2, 4, -1) * scale + zero_point
    assert (np.abs(back - np.asarray(x).reshape(2, 4, -1)) <= np.asarray(scale) / 2 * (1 + 2**-9)).all()


def test_units_that_do_not_fit_are_coarser_and_never_lost():
    codec = Entropy(inner=Stepped(step=0.02, group_size=32), budget=3.0, block=32, ratio=2.0)
    assert codec.stretches == (1.0, 2.0, 4.0, 8.0, 16.0)
    x = normal(3, 1, 2, 128, HEAD_DIM)
    enc = encode(codec, x)
    error = np.abs(np.asarray(decode(codec, enc)) - x)
    assert int(enc.choice.min()) > 0
    reach = float(jnp.abs(x).max()) / 3  # eight codes at worst, three on the shorter side
    assert error.max() <= max(0.02 * 16, reach) / 2 * (1 + 2**-9)


def test_all_errors_of_a_head_of_keys_and_of_all_values_weigh_alike(plan, tables):
    k = np.stack([spec.rungs[0].k.inner.scale.value for spec in plan.specs])
    v = np.stack([spec.rungs[0].v.scale.value for spec in plan.specs])
    weighed = np.log(tables["k_weight"] * k**2)
    np.testing.assert_allclose(weighed, np.broadcast_to(weighed.mean(-1, keepdims=True), weighed.shape), atol=1e-4)
    np.testing.assert_allclose(np.log(k).mean(-1), np.log(tables["k_std"]).mean(-1), atol=1e-4)
    weighed = np.log(tables["v_weight"] * v**2)
    np.testing.assert_allclose(weighed, weighed.mean(), atol=1e-4)
    np.testing.assert_allclose(np.log(v).mean(), np.log(tables["v_std"]).mean(), atol=1e-4)


def test_errors_are_half_a_channels_step_at_most(plan):
    codec = plan.specs[1].rungs[0].v
    x = codec.zero_point.value[:, None] + codec.scale.value[:, None] * np.asarray(normal(4, 1, HEADS, 120, HEAD_DIM))
    inner = dataclasses.replace(codec, inner=codec.inner.inner)  # before entropy coding, which may have to coarsen
    pos = jnp.zeros((1, HEADS, 120), jnp.int32)
    error = np.abs(np.asarray(inner.decode(inner.encode(jnp.asarray(x), pos), pos)) - x)
    assert (error <= 0.125 * codec.scale.value[:, None] * (1 + 2**-8)).all()


def test_quiet_channels_take_no_bits_and_loud_ones_many():
    """Entropy coding: a fixed width would cost the same for both."""
    codec = Entropy(inner=Stepped(step=1.0, group_size=32), block=32, along="token")
    loud = np.where(np.arange(HEAD_DIM) < 4, 20.0, 0.1)
    x = jnp.asarray(np.asarray(normal(5, 1, 1, 256, HEAD_DIM)) * loud, jnp.float32)
    codec = codec.prepare(1, 1, HEAD_DIM).fit(x, jnp.ones((1, 1, 256), bool))
    spare = int(codec.spare_bits(encode(codec, x)).sum())
    used = (codec.nbits(256, HEAD_DIM) - codec.metadata_bits(256, HEAD_DIM) - spare) / x.size
    assert used < 1.6  # 4 of 64 channels at 6.4 bits, the rest at one


@pytest.mark.parametrize("deviation", [0.3, 1.0, 6.0])
def test_bits_of_normal_channels_are_estimated(deviation):
    codes = np.round(np.random.default_rng(2).standard_normal(200_000) * deviation)
    p = np.unique(codes, return_counts=True)[1] / codes.size
    excess = normal_bits(np.full((1, 3), deviation))[0] + (p * np.log2(p)).sum()
    assert 0.04 < excess < 0.09


def test_slots_have_room_for_the_fullest_head_of_a_layer(plan, tables):
    for layer, spec in enumerate(plan.specs):
        units = spec.rungs[0].v
        needed = normal_bits(tables["v_std"][layer] / (units.scale.value * 0.25))
        assert units.inner.budget == pytest.approx(needed.max() + 0.6)


def test_calibration_leaves_sinks_out():
    draw = np.random.default_rng(1).standard_normal
    shape = (2, 40, HEADS, 8)
    layer = Activations(draw(shape), draw(shape), draw(shape) ** 2, draw(shape) ** 2)
    found = calibrate(layer, num_sinks=3)
    rest = layer.k[:, 3:].reshape(-1, HEADS, 8)
    np.testing.assert_allclose(found["k_mean"], rest.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["k_std"], rest.std(0), rtol=1e-5)
    np.testing.assert_allclose(found["v_weight"], layer.v_weight[:, 3:].reshape(-1, HEADS, 8).mean(0), rtol=1e-5)


def test_sinks_and_the_last_tokens_are_exact():
    q, k, v = qkv(6, 1, 80)
    _, cache = prefill(make(FISHER, batch=1, num_kv_heads=2, max_len=128), q, k, v, jnp.array([80]))
    assert int(cache.settled[0]) == 64
    np.testing.assert_array_equal(kvc.live_tokens(cache), [80])
    assert cache.spec.policy.num_sinks == 4


def test_another_models_calibration_is_refused(plan, tables, tmp_path):
    file = tmp_path / "c.safetensors"
    save(file, tables, About("fisher_steps", {"num_sinks": 4}, "x"))
    layout = kvc.Layout(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=32)
    with pytest.raises(ValueError, match="the calibration is of heads and channels"):
        kvc.parse(f"fisher_steps:calibration={file}").plan(layout, max_len=256)
    with pytest.raises(ValueError, match="made with num_sinks=4, not num_sinks=2"):
        kvc.parse(f"fisher_steps:num_sinks=2,calibration={file}").plan(layout, max_len=256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": 0.0}, "step=0.0 must be positive"),
        ({"num_levels": 300}, "num_levels=300"),
        ({"group_size": 0}, "group"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Stepped(**{"step": 0.1, **options})
