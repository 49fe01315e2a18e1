"""Prompts and decode steps of a whole model are timed and drawn, on a tiny model."""

import json

import pytest

from benchmarks import model
from tests.experiments.tiny import write_model


@pytest.mark.slow
def test_every_method_is_timed_and_its_peak_is_counted(tmp_path):
    folder = write_model(tmp_path / "model")
    methods = ("full", "int4:group_size=8", "streaming_llm:budget=16")
    model.main(model.Options(tmp_path / "out.json", methods, 32, 64, str(folder), rounds=2))
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["complete"]
    for section in ("prompts", "decode_steps"):
        rows = content[section]
        assert [row["method"] for row in rows] == list(methods)
        assert all(row["median_s"] > 0 for row in rows)
    assert all(row["peak_bytes"] > 0 for row in content["prompts"])
    assert content["prompts"][0]["times_full"] == pytest.approx(1)
    assert (tmp_path / "out.png").stat().st_size > 1000
