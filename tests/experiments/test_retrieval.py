"""Questions about long contexts: what cases are, what is counted, and a whole run on a tiny model."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

import kvcomp_jax as kvc
import models
from experiments import retrieval
from experiments.cli import run
from experiments.intervals import wilson
from experiments.retrieval_report import cells, score, silent
from experiments.retrieval_tasks import TASKS, Case, Source, make_cases
from models import generate
from tests.experiments import tiny

TASKS_HERE = "needle;key_value_lines"
METHODS = "full;streaming_llm:budget=0.25"


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt", 4000)


@pytest.fixture(scope="module")
def source(model_folder, long_text):
    return Source(long_text.read_text(), models.load(model_folder).tokenizer)


@pytest.fixture(scope="module")
def lm(model_folder):
    return models.load(model_folder)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("whole", [False, True])
def test_contexts_have_their_length_and_hold_what_is_asked(source, lm, task, whole):
    cases = make_cases(source, [task], length=400, cases=3, depths=3, whole=whole, seed=0)
    for case in cases:
        assert len(case.context) + len(case.question) * whole == 400
        text = lm.tokenizer.decode(case.context)
        assert case.score(text) == 1.0
        assert case.score("nothing") == 0.0
        assert all(text.count(answer) == 1 for answer in case.answers) or task in ("variable_tracking", "common_words")


@pytest.mark.parametrize("task", ["needle", "multi_key", "key_value_lines"])
def test_answers_stand_at_their_depth(source, lm, task):
    cases = make_cases(source, [task], length=480, cases=3, depths=3, whole=False, seed=1)
    assert [case.depth for case in cases] == [0.0, 0.5, 1.0]
    at = [lm.tokenizer.decode(case.context).index(case.answers[0]) / 480 for case in cases]
    assert at == sorted(at)
    assert at[2] - at[0] > 0.6


def test_common_words_are_the_most_common(source, lm):
    (case,) = make_cases(source, ["common_words"], length=480, cases=1, depths=1, whole=False, seed=0)
    words = lm.tokenizer.decode(case.context).replace(",", " ").split()
    counts = sorted(words, key=words.count, reverse=True)
    assert min(words.count(answer) for answer in case.answers) >= 3
    assert set(case.answers) <= set(counts[:40])


def test_cases_are_the_same_for_the_same_seed_alone(source):
    options = {"length": 400, "cases": 2, "depths": 2, "whole": False}
    first, again, other = (make_cases(source, ["needle", "multi_key"], seed=seed, **options) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert make_cases(source, ["multi_key"], seed=0, **options) == first[2:]


def test_partial_answers_count_in_part_and_only_as_whole_words():
    case = Case("t", 4, None, (1,), (2,), ("one", "12345"), 8)
    assert case.score("one and 12345.") == 1.0
    assert case.score("someone, 12345") == 0.5
    assert case.score("123456 ones") == 0.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 7), (40, 100)])
def test_intervals_equal_scipy(successes, trials):
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(successes, trials), (expected.low, expected.high), atol=1e-12)


@pytest.mark.parametrize("trials", range(1, 60, 7))
def test_intervals_hold_their_share(trials):
    for successes in (0, trials / 3, trials):
        low, high = wilson(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="successes=3"):
        wilson(3, 2)


def arguments(model_folder, text, out, *more):
    sizes = ["--lengths", "80", "192", "--cases", "4", "--depths", "2", "--batch", "3"]
    return ["--model", str(model_folder), "--text", str(text), "--out", str(out), *sizes, *more]


@pytest.fixture(scope="module")
def finished(model_folder, long_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    args = arguments(model_folder, long_text, out, "--methods", METHODS, "--tasks", TASKS_HERE)
    assert run(retrieval.Config, retrieval.main, args) == 0
    return out


def test_every_method_is_asked_the_same(finished):
    results = tiny.read_results(finished)
    assert [row["method"] for row in results["rows"]] == METHODS.split(";")
    asked = [[(c["task"], c["length"], c["depth"]) for c in row["cases"]] for row in results["rows"]]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 2 * 2 * 4
    assert results["meta"]["versions"].keys() >= {"python", "jax"}
    smaller = [float(row[1]) for row in cells(results)[1]]
    assert smaller[0] == 1.0
    assert 3 < smaller[1] < 4.1
    assert silent(results) == TASKS_HERE.split(";")  # random weights know nothing


def test_the_report_shows_scores_and_plots(finished, capsys):
    page = (finished / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "needle†" in page
    assert "says nothing" in page
    for name in ("heatmaps.png", "tasks.png"):
        assert (finished / name).stat().st_size > 1000


def test_a_finished_run_asks_nothing_again(finished, model_folder, long_text, monkeypatch):
    monkeypatch.setattr(retrieval, "ask", None)
    args = arguments(model_folder, long_text, finished, "--methods", METHODS, "--tasks", TASKS_HERE)
    assert run(retrieval.Config, retrieval.main, args) == 0


def test_scores_are_counted_where_they_belong():
    cases = [
        {"task": "a", "length": 10, "depth": 0.0, "score": 1.0},
        {"task": "a", "length": 20, "depth": 0.0, "score": 0.0},
        {"task": "b", "length": 10, "depth": None, "score": 0.5},
    ]
    row = {"cases": cases}
    assert score(row, task="a")[0] == 0.5
    assert score(row, task="a", length=10)[0] == 1.0
    assert score(row, task="b")[3] == 1
    assert math.isnan(score(row, task="c")[0])


@pytest.mark.parametrize("query_aware", [False, True])
def test_answers_equal_those_of_plain_generation(lm, source, query_aware):
    config = retrieval.Config(text=None, batch=2, query_aware=query_aware)
    cases = make_cases(source, ["needle"], length=160, cases=2, depths=2, whole=query_aware, seed=0)
    room = max(case.max_new_tokens for case in cases)
    plan = kvc.parse("full").plan(lm.layout, max_len=300, prompt_len=160)
    texts, held = retrieval.answer(lm, plan, config, cases, 80, room)
    prompts = [case.context + case.question for case in cases]
    plain = generate.generate(lm, prompts, max_new_tokens=room)
    assert texts == [lm.tokenizer.decode(ids[: c.max_new_tokens]) for ids, c in zip(plain.tokens, cases, strict=True)]
    assert held.used >= 2 * 160 * 2 * 3 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--tasks", "needles"], "unknown task 'needles'"),
        (["--tasks", ";"], "names no task"),
        (["--lengths", "16"], "does not fit into length=16"),
        (["--lengths", "600"], "512 positions"),
        (["--cases", "0"], "cases=0"),
        (["--methods", "kivy"], "did you mean 'kivi'"),
        (["--cache-dtype", "int3"], "int3"),
    ],
)
def test_bad_arguments_are_one_line(model_folder, long_text, tmp_path, capsys, change, words):
    args = arguments(model_folder, long_text, tmp_path, "--methods", "full", "--tasks", "needle", *change)
    assert run(retrieval.Config, retrieval.main, args) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
