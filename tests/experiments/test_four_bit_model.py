"""The experiment over rotations and bits, on a tiny model."""

import pytest

import models
from experiments import four_bit_model, four_bit_report
from experiments.cli import run
from tests.experiments.tiny import read_results, write_text

ROW = {
    "model": "rotated", "cache": "full", "perplexity": 9.0, "kl": 0.1, "largest_change": 1.0, "weight_bytes": 1000,
    "bits_per_value": 16.0,
}  # fmt: skip


@pytest.mark.slow
def test_each_switch_is_scored(model_folder, tmp_path, capsys):
    sizes = {"context": 32, "score": 16, "windows": 1, "calibration": 2, "calibration-tokens": 32}
    args = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    args += ["--model", str(model_folder), "--text", str(write_text(tmp_path / "text.txt"))]
    args += ["--out", str(tmp_path)]
    assert run(four_bit_model.Config, four_bit_model.main, args) == 0
    shown = capsys.readouterr().out
    results = read_results(tmp_path)["rows"]
    rows = {(row["model"], row["cache"]): [float(cell) for cell in four_bit_report.cells(row)[2:]] for row in results}
    assert len(rows) == 10
    assert all(cell in shown for row in results for cell in four_bit_report.cells(row))
    assert all((tmp_path / name).stat().st_size for name in ("four_bit_model.png", "index.html"))
    assert rows["as loaded", "full"][1] == 0
    perplexity, kl, change, megabytes, bits = rows["rotated", "full"]
    assert perplexity > 1
    assert kl < 1e-4
    assert change < 1e-4
    assert 32 <= bits < 32.2  # a short context and its counters
    assert rows["rotated W4 GPTQ", "full"][3] < megabytes
    assert rows["rotated", "quarot:rotate_v=false"][4] < 32
    assert rows["rotated A4", "full"][1] > kl


def test_a_text_must_be_long_enough(model_folder, tmp_path, capsys):
    args = ["--model", str(model_folder), "--text", str(write_text(tmp_path / "text.txt", 400))]
    assert run(four_bit_model.Config, four_bit_model.main, args) == 2
    assert "take a longer text or fewer windows" in capsys.readouterr().err


def test_what_was_scored_is_not_scored_again(model_folder, tmp_path, monkeypatch):
    settings = {"model": str(model_folder), "context": 32, "score": 16, "windows": 1, "calibration": 2}
    config = four_bit_model.Config(
        text=write_text(tmp_path / "text.txt"), calibration_tokens=32, out=tmp_path, **settings
    )
    for name in ("rotate", "to_integers"):
        monkeypatch.setattr(models, name, lambda lm, *_, **__: lm)
    monkeypatch.setattr(four_bit_model, "score", lambda *_: ([], None))
    monkeypatch.setattr(four_bit_model, "compare", lambda variant, *_: ROW | {"method": variant.name})
    four_bit_model.main(config)
    first = read_results(tmp_path)["rows"]
    assert len(first) == 10
    monkeypatch.setattr(four_bit_model, "compare", None)
    four_bit_model.main(config)
    assert read_results(tmp_path)["rows"] == first
