import numpy as np
import pytest

import kvcomp_jax as kvc
import models
from experiments import calibrate, compare
from experiments.cli import run
from kvcomp_jax.calibrate import load
from tests.experiments import tiny

SIZES = ["--samples", "2", "--seq-len", "48"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, text_file):
    """A model of its own, because the result is saved beside it."""
    folder = tiny.write_model(tmp_path_factory.mktemp("calibrated"))
    arguments = ["--model", str(folder), "--text", str(text_file), "--method", "kvquant:bits=4", *SIZES]
    assert run(calibrate.Config, calibrate.main, arguments) == 0
    return folder


def test_the_result_lies_beside_the_model_and_says_where_it_comes_from(calibrated, text_file):
    (file,) = (calibrated / "calibration").iterdir()
    assert file.name == "kvquant-bits=4-outliers=0.01-num_sinks=1-across_heads=True.safetensors"
    tensors, about = load(file)
    assert tensors["k_scale"].shape == (3, 2, 16)
    assert tensors["v_levels"].shape == (3, 16)
    assert about.fingerprint == models.load(calibrated).layout.fingerprint
    assert about.provenance["tokens_read"] == [1000 - 96, 1000]
    assert len(about.provenance["text_sha256"]) == 64
    assert about.provenance["versions"]["jax"]


def test_a_comparison_knows_which_tokens_it_has_seen(calibrated, text_file):
    layout, text = models.load_layout(str(calibrated)), text_file.read_text()
    for last, seen in ((903, False), (904, True)):
        assert compare.calibrated_on("h2o+kvquant:bits=4", layout, text, np.array([[0, last]])) is seen


@pytest.mark.slow
def test_it_is_found_and_used(calibrated, text_file, tmp_path):
    methods = "full;kvquant:bits=4"
    arguments = ["--model", str(calibrated), "--text", str(text_file), "--methods", methods, "--out", str(tmp_path)]
    small = ["--context", "65", "--score", "8", "--windows", "2", "--decode-steps", "2", "--repeats", "1"]
    assert run(compare.Config, compare.main, arguments + small) == 0
    _, row = tiny.read_results(tmp_path)["rows"]
    assert 0 < row["kl"] < 0.1
    assert row["times_smaller"] > 2


def test_another_model_refuses_it(calibrated, text_file, model_folder, tmp_path, capsys):
    (file,) = (calibrated / "calibration").iterdir()
    lm = models.load(calibrated)
    other = models.LanguageModel(lm.config, {"params": {**lm.params["params"]}})
    other.params["params"]["final_norm"] = {"weight": lm.params["params"]["final_norm"]["weight"] + 0.1}
    with pytest.raises(ValueError, match="is of another model"):
        kvc.parse(f"kvquant:bits=4,calibration={file}").plan(other.layout, max_len=64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ["--method", "kivi"],
            "kivi: needs no calibration; methods that do: duo_attention, fisher_steps, kvquant, zeroc",
        ),
        (["--samples", "100"], "the text has 1000 tokens; samples=100 of seq_len=2048 need 204800"),
        (["--seq-len", "0"], "seq_len=0 must be at least 1"),
        (["--method", "kvquant:bit=3"], "kvquant has no option 'bit'"),
    ],
)
def test_bad_arguments_are_one_line(change, words, model_folder, text_file, tmp_path, capsys):
    arguments = ["--model", str(model_folder), "--text", str(text_file), "--out", str(tmp_path / "x.safetensors")]
    assert run(calibrate.Config, calibrate.main, [*arguments, *change]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.safetensors").exists()


def test_samples_are_the_end_of_the_text():
    samples = calibrate.cut_samples(list(range(100)), 3, 10)
    np.testing.assert_array_equal(samples.reshape(-1), np.arange(70, 100))
