"""The experiment over rotations and bits, on a tiny model."""

import pytest

from experiments import four_bit_model
from experiments.cli import run
from tests.experiments.tiny import write_text


@pytest.mark.slow
def test_each_switch_is_scored(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    sizes = {"context": 32, "score": 16, "windows": 1, "calibration": 2, "calibration-tokens": 32}
    args = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    args += ["--model", str(model_folder), "--text", str(write_text(tmp_path / "text.txt"))]
    assert run(four_bit_model.Config, four_bit_model.main, args) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    rows = {(cells[1].strip(), cells[2].strip()): [float(cell) for cell in cells[3:-1]] for cells in lines}
    assert len(rows) == 10
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
