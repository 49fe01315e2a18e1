"""Benchmarks run by hand must still run: their steps at tiny shapes."""

import json

import pytest

from benchmarks.gpu import steps
from benchmarks.record import Record


@pytest.mark.slow
def test_the_rehearsal_of_decode_steps_fills_caches_and_times_every_method(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "METHODS", ("full", "int4"))
    record = Record(tmp_path / "gpu.json", 600.0)
    steps.measure(record, layers=2, rounds=3, workers=1, tiny=True)
    full, int4 = json.loads(record.path.read_text())["decode_steps"]
    assert (full["method"], int4["method"]) == ("full", "int4")
    assert (
        full["cache_bytes"] > 2 * 2 * 2 * 512 * 2 * 128 * 4
    )  # 2 layers, K and V, 2 rows of 512 tokens, 2 heads of 128
    assert full["cache_bytes"] > 3 * int4["cache_bytes"]
    assert int4["times_faster_than_full"] == pytest.approx(full["median_s"] / int4["median_s"])


def test_decode_steps_do_not_begin_late(tmp_path):
    record = Record(tmp_path / "gpu.json", steps.SECONDS - 1)
    steps.measure(record, layers=2, rounds=3, workers=1, tiny=True)
    assert record.content["cut"] == [{"decode_steps": "not reached"}]
