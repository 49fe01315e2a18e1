import dataclasses
import json
import math
import signal
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest

import models
from experiments import compare, report
from experiments.cli import run
from experiments.measure import Bench
from experiments.texts import load_text, sha256
from kvcomp_jax.calibrate import About, save
from tests.experiments import tiny

SIZES = ["--context", "64", "--score", "32", "--windows", "2", "--decode-steps", "4", "--repeats", "2"]
KEYS = {
    "method", "perplexity", "kl", "top1", "bytes_allocated", "bytes_used", "bytes_metadata", "bits_per_value",
    "times_smaller", "prefill_s", "compile_s", "decode_tokens_per_s", "decode_tokens_per_s_range", "kernel", "note",
}  # fmt: skip
META_KEYS = {
    "command", "versions", "device", "model", "text", "seed", "context", "score", "windows", "stream", "methods",
}  # fmt: skip


def arguments(model_folder, text_file, out, methods=tiny.METHODS, sizes=SIZES):
    return ["--model", str(model_folder), "--text", str(text_file), "--methods", methods, "--out", str(out), *sizes]


@pytest.fixture(scope="module")
def finished(model_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert run(compare.Config, compare.main, arguments(model_folder, text_file, out)) == 0
    return out


def test_every_method_has_a_row_with_every_figure(finished):
    results = tiny.read_results(finished)
    assert set(results) == {"meta", "rows"}
    assert set(results["meta"]) >= META_KEYS
    assert results["meta"]["versions"].keys() >= {"python", "jax", "jaxlib", "flax", "numpy", "kvcomp_jax"}
    assert [row["method"] for row in results["rows"]] == tiny.METHODS.split(";")
    for row in results["rows"]:
        assert row.keys() >= KEYS
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers))
        assert row["bytes_metadata"] <= row["bytes_used"] <= row["bytes_allocated"]
        low, high = row["decode_tokens_per_s_range"]
        assert 0 < low <= row["decode_tokens_per_s"] <= high
    for name in ("pareto.png", "index.html"):
        assert (finished / name).stat().st_size > 1000


def test_full_is_the_reference_and_equals_a_model_without_cache(finished, model_folder, text_file):
    full = tiny.read_results(finished)["rows"][0]
    assert (full["kl"], full["top1"], full["times_smaller"], full["note"]) == (0.0, 1.0, 1.0, "")
    lm = models.load(model_folder)
    tokens = np.array(lm.tokenizer.encode(text_file.read_text()))
    windows = np.stack([tokens[start : start + 96] for start in (0, 500)])
    logits = np.asarray(lm(windows), np.float64)[:, 64:95]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, windows[:, 65:, None], -1).mean()
    assert math.log(full["perplexity"]) == pytest.approx(expected, abs=1e-5)


def test_bytes_and_bits_are_those_of_the_cache(finished):
    rows = {row["method"]: row for row in tiny.read_results(finished)["rows"]}
    values = 2 * 64 * 3 * 2 * 16  # k and v, tokens, layers, kv heads, head_dim
    for row in rows.values():
        assert row["bits_per_value"] == pytest.approx(8 * row["bytes_used"] / values)
    assert rows["full"]["bytes_used"] - rows["full"]["bytes_metadata"] == 4 * values
    kept = rows["streaming_llm:budget=40"]
    assert kept["bytes_used"] - kept["bytes_metadata"] == 4 * values * 40 // 64
    assert rows["kivi:bits=2,group_size=16,residual=32"]["kl"] > rows["int8:block_size=16"]["kl"] > 0


@pytest.mark.slow
def test_streaming_is_another_measurement_and_a_row_that_saves_nothing_says_so(
    finished, model_folder, text_file, tmp_path
):
    methods = "streaming_llm:budget=40;streaming_llm:budget=96"
    assert run(compare.Config, compare.main, [*arguments(model_folder, text_file, tmp_path, methods), "--stream"]) == 0
    chunk, stream = (tiny.read_results(folder)["rows"] for folder in (finished, tmp_path))
    assert stream[0]["perplexity"] == pytest.approx(chunk[0]["perplexity"], rel=1e-4)  # full
    assert stream[1]["kl"] != chunk[3]["kl"]
    assert [row["note"] for row in stream] == ["", "", "no bytes saved"]
    assert "no bytes saved" in (tmp_path / "index.html").read_text()


@pytest.fixture
def measured(monkeypatch):
    """Methods that were measured, each as if it were the full cache, whose programs are there."""
    measure, names = Bench.measure, []

    def as_full(self, method, advance):
        names.append(method)
        scores, row = self._full_row
        with monkeypatch.context() as patch:
            patch.setattr(self, "_full_row", (scores, dict(row)))
            return measure(self, "full", advance)

    monkeypatch.setattr(Bench, "measure", as_full)
    return names


def test_an_interrupted_run_goes_on_where_it_stopped(model_folder, text_file, tmp_path, measured, monkeypatch, capsys):
    measure = Bench.measure

    def interrupted(self, method, advance):
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(self, method, advance)

    args = arguments(model_folder, text_file, tmp_path, "full;int8:block_size=16;streaming_llm:budget=40")
    monkeypatch.setattr(Bench, "measure", interrupted)
    assert run(compare.Config, compare.main, args) == 130
    before = tiny.read_results(tmp_path)["rows"]
    assert [row["method"] for row in before] == ["full", "int8:block_size=16"]
    measured.clear()
    assert run(compare.Config, compare.main, args) == 0
    after = tiny.read_results(tmp_path)["rows"]
    assert measured == ["streaming_llm:budget=40"]
    assert after[:2] == before
    monkeypatch.setattr(Bench, "__init__", None)  # a finished run measures nothing again
    assert run(compare.Config, compare.main, args) == 0
    capsys.readouterr()
    assert run(compare.Config, compare.main, [*args, "--seed", "1"]) == 2
    assert "seed=0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_calibrated_on_scored_tokens_says_so(model_folder, text_file, tmp_path, measured):
    """The windows are of tokens 0 to 95 and 500 to 595."""
    layout, options = models.load(model_folder).layout, {"num_sinks": 4, "recent": 16}
    text, methods = load_text(text_file), ["full"]
    for name, first in (("on", 595), ("after", 596)):
        made = {"text_sha256": sha256(text), "tokens_read": [first, 1000]}
        about = About("duo_attention", options, layout.fingerprint, made)
        save(tmp_path / name, {"beyond": np.arange(6, dtype=np.float32).reshape(3, 2)}, about)
        methods.append(f"duo_attention:num_sinks=4,recent=16,calibration={tmp_path / name}")
    assert run(compare.Config, compare.main, arguments(model_folder, text_file, tmp_path, ";".join(methods))) == 0
    assert measured == methods
    notes = [row["note"] for row in tiny.read_results(tmp_path)["rows"]]
    assert ["calibrated on scored tokens" in note for note in notes] == [False, True, False]
    assert "calibrated on scored tokens" in (tmp_path / "index.html").read_text()
    assert not compare.calibrated_on(methods[1], layout, text + " another", np.array([[595]]))


@pytest.mark.slow
def test_recall_from_host_memory_of_pages_and_of_single_tokens_is_reported(model_folder, text_file, tmp_path):
    pages = "arkvale:budget=40,page_size=8,recalls=2,full_layers=1,memory=host"
    tokens = "cluster_kv:budget=40,num_sinks=4,clusters=4,window=16,window_clusters=2,full_layers=1,memory=host"
    args = arguments(model_folder, text_file, tmp_path, f"full;{pages};{tokens}")
    assert run(compare.Config, compare.main, args) == 0
    full, row, single = tiny.read_results(tmp_path)["rows"]
    assert full["bytes_host"] == 0
    assert "recall_hit_rate" not in full
    page, layers, num_pages = 2 * 2 * 8 * 16 * 4, 2, 96 // 8 + 1  # k and v, heads, tokens, head_dim, float32
    assert 0 <= row["recall_hit_rate"] < 1
    assert row["recall_bytes_per_step"] == pytest.approx((1 - row["recall_hit_rate"]) * 2 * layers * page)
    assert abs(row["bytes_host"] - layers * num_pages * page) <= layers * page
    assert "MB of it on the host; " in row["note"]
    heads, read, token = 4, 36, 2 * 16 * 4  # query heads, tokens each reads, k and v of float32
    missed = 1 - single["recall_hit_rate"]
    assert 0 < missed < 1
    assert single["recall_bytes_per_step"] == pytest.approx(missed * layers * heads * read * token)
    assert "of pages wanted at hand" in single["note"]
    assert "recalled a step" in (tmp_path / "index.html").read_text()


@pytest.mark.slow
def test_a_killed_run_keeps_its_finished_rows(model_folder, text_file, tmp_path):
    options = arguments(model_folder, text_file, tmp_path, "full;int8")
    args = [sys.executable, "-m", "experiments.compare", *options]
    file = tmp_path / "results.json"
    with subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not file.exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = json.loads(file.read_text())["rows"]
    assert len(before) >= 1
    again = subprocess.run(args, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    after = json.loads(file.read_text())["rows"]
    assert len(after) == 2
    assert after[: len(before)] == before


def test_lists_leave_out_what_is_not_calibrated_and_single_methods_complain(model_folder):
    layout = models.load_layout(str(model_folder))
    config = compare.Config(text=None, methods="all-quantising;int8", context=64, score=32)
    kept, missing = compare.calibrated(config, layout, ["int8", "kvquant", "kivi:group_size=16,residual=16"])
    assert kept == ["int8", "kivi:group_size=16,residual=16"]
    assert len(missing) == 1
    assert missing[0].startswith("kvquant: no calibration at")
    named = dataclasses.replace(config, methods="int8;kvquant")
    assert compare.calibrated(named, layout, ["int8", "kvquant"]) == (["int8", "kvquant"], [])
    with pytest.raises(ValueError, match=r"kvquant: no calibration at .*experiments.calibrate --method kvquant"):
        compare.check(named, layout, ["int8", "kvquant"])


def test_a_plot_of_many_methods_numbers_them_from_the_nearest_on():
    figure, axes = plt.subplots()
    rows = [{"method": f"h2o:budget={n}", "bits_per_value": 16 / n, "kl": 0.01 * n} for n in range(12, 0, -1)]
    report.draw_points(axes, rows, None)
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == ["1  h2o:budget=1", "2  h2o:budget=2"]
    assert len(axes.collections) == 12
    plt.close(figure)
