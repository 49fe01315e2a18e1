"""How KVQuant is calibrated: levels by weighted k-means, and files that say what they are for."""

import dataclasses

import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.calibrate import About, load, nearest_levels, save, weighted_kmeans
from kvcomp_jax.types import Constant
from tests.golden.make_calibrations import OPTIONS
from tests.laws.parts import CALIBRATIONS, HEAD_DIM, KVQUANT_3, ROPE
from tests.methods.test_kvquant import HEADS, LAYOUT, rung

# 5. Weighted k-means.


def lloyd(x, levels, iterations=50):
    for _ in range(iterations):
        nearest = np.abs(x[:, None] - levels).argmin(1)
        levels = np.array([x[nearest == i].mean() if (nearest == i).any() else c for i, c in enumerate(levels)])
    return levels


def test_equal_weights_give_plain_kmeans():
    x = np.random.default_rng(0).standard_normal(500)
    start = np.linspace(-2, 2, 8)
    levels, _ = weighted_kmeans(x, np.full(500, 3.0), start)
    np.testing.assert_allclose(levels, lloyd(x, start), rtol=1e-9)


def test_the_weighted_loss_never_increases_and_weights_matter():
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal(2000), rng.exponential(size=2000) ** 3
    levels, losses = weighted_kmeans(x, weight, np.linspace(-0.1, 0.1, 8))
    assert (np.diff(losses) <= 1e-9 * losses[0]).all()
    assert losses[-1] < losses[0] / 2

    def loss(levels):
        return (weight * (x - levels[nearest_levels(x, levels)]) ** 2).sum() / weight.mean()

    assert losses[-1] == pytest.approx(loss(levels), rel=1e-2)
    plain, _ = weighted_kmeans(x, np.ones(2000), np.linspace(-0.1, 0.1, 8))
    assert loss(weighted_kmeans(x, weight, plain)[0]) < 0.95 * loss(plain)


@pytest.mark.parametrize(
    ("weight", "words"), [(np.zeros(3), "all weights are zero"), (np.array([1.0, np.nan, 1.0]), "must be finite")]
)
def test_useless_weights_are_refused(weight, words):
    with pytest.raises(ValueError, match=words):
        weighted_kmeans(np.arange(3.0), weight, np.array([0.0, 1.0]))


# Calibrations: made once, refused where they do not belong.


def test_calibrations_keep_what_they_are_made_of(tmp_path):
    about = About("kvquant", {"bits": 3}, "abc", {"text_sha256": "d", "tokens_read": [1, 2]})
    tensors = {"k_scale": np.ones((2, 3), np.float32)}
    save(tmp_path / "c.safetensors", tensors, about)
    again, found = load(tmp_path / "c.safetensors")
    assert found == about
    np.testing.assert_array_equal(again["k_scale"], tensors["k_scale"])
    assert [f.name for f in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_calibration_of_another_model_is_refused():
    layout = dataclasses.replace(LAYOUT, fingerprint="0123456789abcdef")
    with pytest.raises(ValueError, match=r"is of another model: its fingerprint is made up, this model's 0123456789ab"):
        rung(layout=layout)
    assert rung(layout=dataclasses.replace(LAYOUT, fingerprint="made up")) == rung()
    with pytest.raises(ValueError, match="do not fit 2 layers"):
        rung(layout=dataclasses.replace(LAYOUT, num_layers=2, ropes=(ROPE, ROPE)))
    with pytest.raises(ValueError, match="heads=4, head_dim=64"):
        rung(layout=dataclasses.replace(LAYOUT, num_kv_heads=4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("bits=4,", "was made with bits=3, not bits=4"),
        ("outliers=0.02,", "was made with outliers=0.01, not outliers=0.02"),
        ("across_heads=False,", "was made with across_heads=True, not across_heads=False"),
        ("outliers=0.7,", r"outliers=0.7 is a share of the values and must be in \[0, 0.5\)"),
        ("bits=5,", "bits=5 must be one of 1, 2, 3, 4"),
    ],
)
def test_a_calibration_of_other_options_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        rung(KVQUANT_3.replace(":", f":{change}"))


def test_an_absent_calibration_says_how_to_make_it(tmp_path):
    layout = dataclasses.replace(LAYOUT, calibrations=str(tmp_path))
    with pytest.raises(ValueError, match=r"experiments.calibrate --method kvquant:bits=4,outliers=0.01,num_sinks=1"):
        rung("kvquant:bits=4", layout)
    source = CALIBRATIONS / "kvquant_3.safetensors"
    name = "kvquant-bits=3-outliers=0.01-num_sinks=1-across_heads=True.safetensors"
    (tmp_path / name).write_bytes(source.read_bytes())
    assert rung("kvquant", layout) == rung()  # found beside the model by its name
    assert rung(f"kvquant:calibration={source}", kvc.Layout(1, HEADS, HEAD_DIM, ropes=(ROPE,))) == rung()


def test_damaged_calibrations_are_refused(tmp_path):
    whole = (CALIBRATIONS / "kvquant_3.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for content, words in (
        (whole[:-7], "not a whole safetensors file"),
        (bytes(flipped), "is damaged, its tensors do not have the checksum"),
        (b"junk", "not a whole safetensors file"),
    ):
        file = tmp_path / f"{len(content)}-{words[:3]}.safetensors"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            rung(f"kvquant:calibration={file}")
    from safetensors.numpy import save_file

    save_file({"x": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a calibration"):
        rung(f"kvquant:calibration={tmp_path / 'other.safetensors'}")


def test_layers_have_ropes_and_levels_of_their_own(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: np.repeat(x, 2, 0) for name, x in load(CALIBRATIONS / "kvquant_3.safetensors")[0].items()}
    tensors["k_scale"][1] *= 2
    save(tmp_path / "two.safetensors", tensors, About(*OPTIONS["kvquant_3"], "x"))
    other = kvc.Rotary(Constant(rng.random(8).astype(np.float32)))
    layout = dataclasses.replace(LAYOUT, num_layers=2, ropes=(ROPE, other))
    plan = kvc.parse(f"kvquant:calibration={tmp_path / 'two.safetensors'}").plan(layout, max_len=64)
    first, second = (spec.rungs[0].k for spec in plan.specs)
    assert (first.rope, second.rope) == (ROPE, other)
    np.testing.assert_array_equal(second.inner.scale.value, 2 * first.inner.scale.value)
