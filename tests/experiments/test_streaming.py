"""Streams through a cache: what is judged, what a chunk is, and whole runs on a tiny model."""

import dataclasses
import json

import numpy as np
import pytest

import kvcomp_jax as kvc
import models
from experiments import streaming
from experiments.cli import run
from experiments.streaming_report import cells
from tests.experiments import tiny

SIZES = ["--prompt", "32", "--tokens", "96", "--every", "32"]
RING = "streaming_llm:budget=24,positions=cache"


@pytest.fixture(scope="module")
def lm(model_folder):
    return models.load(model_folder)


def arguments(model_folder, text_file, out, *more):
    return ["--model", str(model_folder), "--text", str(text_file), "--out", str(out), *SIZES, *more]


@pytest.fixture(scope="module")
def own(model_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("own")
    args = arguments(model_folder, text_file, out, "--methods", f"full;h2o:budget=40;{RING}")
    assert run(streaming.Config, streaming.main, args) == 0
    return out


def test_the_full_cache_judges_its_own_continuation_as_a_model_without_cache(own, lm):
    tokens = np.array(json.loads((own / "continuation.json").read_text()))
    assert len(tokens) == 128
    logits = np.asarray(lm(tokens[None]), np.float64)[0]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -log_probs[np.arange(32, 127), tokens[33:]]
    full = tiny.read_results(own)["rows"][0]
    got = [point["nll"] for point in full["curve"]]
    np.testing.assert_allclose(got, [part.mean() for part in np.split(expected, [32, 64])], atol=1e-4)
    assert [point["tokens"] for point in full["curve"]] == [64, 96, 128]


def test_memory_grows_for_the_full_cache_alone_and_nothing_is_compiled_again(own):
    rows = tiny.read_results(own)["rows"]
    used = [[point["bytes_used"] for point in row["curve"]] for row in rows]
    assert used[0][0] < used[0][1] < used[0][2]
    assert used[2][0] == used[2][1] == used[2][2]
    assert used[1][2] < 0.5 * used[0][2]
    assert all(row["programs"] == 1 for row in rows)
    assert (own / "stream.png").stat().st_size > 1000
    assert "data:image/png;base64," in (own / "index.html").read_text()


def test_a_finished_run_feeds_nothing_again_and_keeps_its_continuation(own, model_folder, text_file, monkeypatch):
    monkeypatch.setattr(streaming, "follow", None)
    monkeypatch.setattr(streaming, "continuation", None)
    args = arguments(model_folder, text_file, own, "--methods", f"full;h2o:budget=40;{RING}")
    assert run(streaming.Config, streaming.main, args) == 0


def test_a_text_may_be_longer_than_the_model_is_made_for(model_folder, text_file, tmp_path, capsys):
    sizes = ["--source", "text", "--tokens", "640", "--chunk", "16", "--every", "64", "--methods", RING]
    assert run(streaming.Config, streaming.main, [*arguments(model_folder, text_file, tmp_path), *sizes]) == 0
    assert "512 positions" in " ".join(capsys.readouterr().out.split())
    (row,) = tiny.read_results(tmp_path)["rows"]
    assert row["programs"] == 1
    assert len({point["bytes_allocated"] for point in row["curve"]}) == 1
    assert all(np.isfinite(point["nll"]) for point in row["curve"])


@pytest.mark.parametrize("method", ["full:block_size=8", "int8:block_size=8"])
def test_chunks_see_what_single_tokens_see_where_nothing_is_evicted(lm, method):
    stream = np.random.default_rng(0).integers(1, 199, 96).tolist()
    config = streaming.Config(text=None, prompt=32, tokens=64, every=32)
    rows = [
        streaming.follow(lm, method, dataclasses.replace(config, chunk=chunk), stream, lambda _: None)
        for chunk in (1, 16)
    ]
    one, sixteen = ([point["nll"] for point in row["curve"]] for row in rows)
    np.testing.assert_allclose(one, sixteen, atol=1e-5 if "full" in method else 2e-2)


def test_eviction_while_decoding_is_judged(lm):
    stream = np.random.default_rng(0).integers(1, 199, 128).tolist()
    config = streaming.Config(text=None, prompt=32, tokens=96, every=32)
    full, evicts, roomy = (
        [p["nll"] for p in streaming.follow(lm, method, config, stream, lambda _: None)["curve"]]
        for method in ("full", "streaming_llm:budget=36", "streaming_llm:budget=128")
    )
    np.testing.assert_allclose(full, roomy, atol=1e-5)
    assert abs(full[2] - evicts[2]) > 1e-3


def test_quarters_are_means_over_the_curve():
    curve = [{"tokens": i, "nll": float(i), "bytes_used": 2e6, "bytes_allocated": 3e6} for i in range(4)]
    row = {"method": "m", "tokens_per_s": 5.0, "programs": 1, "curve": curve}
    assert cells(row) == ["m", "4.48", "1.00", "20.09", "2.00", "3.00", "5.0", "1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--tokens", "100"], "tokens=100 must be a multiple of every=32"),
        (["--chunk", "5"], "every=32 must be a multiple of chunk=5"),
        (["--tokens", "512"], "take --source text"),
        (["--tokens", "1024", "--source", "text"], "the text has 1000 tokens, 1056 are needed"),
        (["--prompt", "0"], "prompt=0"),
        (["--methods", "kivy"], "did you mean 'kivi'"),
        (["--source", "book"], "--source"),
    ],
)
def test_bad_arguments_are_one_line(model_folder, text_file, tmp_path, capsys, change, words):
    assert run(streaming.Config, streaming.main, arguments(model_folder, text_file, tmp_path, *change)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_plans_of_default_methods_exist(lm):
    for method in streaming.DEFAULT_METHODS.split(";"):
        kvc.parse(method).plan(lm.layout, max_len=4608, prompt_len=512)
