"""Serving in slots, on a tiny model: who comes, what is compared, what is shown."""

import pytest

from experiments import batching
from experiments.cli import run
from tests.experiments import tiny

METHODS = "full;snapstream:budget=0.5,num_queries=8"


def arguments(model_folder, text_file, out, *more):
    sizes = ["--requests", "10", "--slots", "3", "--prompt", "16", "48", "--new", "2", "20", "--gap", "2"]
    return ["--model", str(model_folder), "--text", str(text_file), "--out", str(out), *sizes, *more]


@pytest.fixture(scope="module")
def finished(model_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert run(batching.Config, batching.main, arguments(model_folder, text_file, out, "--methods", METHODS)) == 0
    return out


def test_requests_get_what_they_get_alone_in_one_program(finished):
    results = tiny.read_results(finished)
    wanted = [row["tokens"] for row in results["rows"]]
    for row in results["rows"]:
        assert (row["requests"], row["mismatches"], row["programs"]) == (10, 0, 1)
        assert 1 < row["slots_used"] <= 3
        assert row["trace"][-1][2] == row["tokens"]
        assert [live for _, live, _ in row["trace"]].count(3) > 0
    assert wanted[0] == wanted[1]
    assert (finished / "slots.png").stat().st_size > 1000
    assert "data:image/png;base64," in (finished / "index.html").read_text()


def test_a_difference_would_be_counted(model_folder, text_file, tmp_path, monkeypatch):
    class Wrong(batching.Engine):
        def run(self, requests=(), watch=None):
            outputs = super().run(requests, watch)
            return outputs if watch is None else [*outputs[:-1], [-1]]

    make = batching.make_engine

    def wrong(*args, **options):
        engine = make(*args, **options)
        engine.__class__ = Wrong
        return engine

    monkeypatch.setattr(batching, "make_engine", wrong)
    assert run(batching.Config, batching.main, arguments(model_folder, text_file, tmp_path, "--methods", "full")) == 0
    assert tiny.read_results(tmp_path)["rows"][0]["mismatches"] == 1


def test_requests_are_drawn_from_the_seed():
    config = batching.Config(text=None, requests=6, prompt=(3, 9), new=(1, 5))
    first, again = (batching.draw(config, list(range(100, 200))) for _ in range(2))
    assert first == again
    assert {len(request.prompt) for request in first} <= set(range(3, 10))
    assert all(1 <= request.max_new_tokens <= 5 for request in first)
    arrivals = [request.arrival for request in first]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] > 0
    for request in first:
        assert list(request.prompt) == list(range(request.prompt[0], request.prompt[0] + len(request.prompt)))


def test_texts_shorter_than_prompts_are_refused():
    with pytest.raises(ValueError, match="the text has 100 tokens, prompts up to 500; take a longer text"):
        batching.draw(batching.Config(text="book.txt", prompt=(16, 500)), list(range(100)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--requests", "0"], "requests=0"),
        (["--prompt", "9", "3"], "prompt=9 3"),
        (["--prompt", "16", "500"], "prompt=500 + new=20 tokens exceed the model's 512 positions"),
        (["--gap", "-1"], "gap=-1.0"),
        (["--methods", "kivy"], "did you mean 'kivi'"),
    ],
)
def test_bad_arguments_are_one_line(model_folder, text_file, tmp_path, capsys, change, words):
    assert run(batching.Config, batching.main, arguments(model_folder, text_file, tmp_path, *change)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
