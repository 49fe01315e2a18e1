"""The protocol, the results file and the command lines."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compare, memory, methods, report
from experiments.cli import run
from experiments.protocol import compare_logits, cut_windows
from experiments.results import Results
from tests.laws.parts import normal

ROW = {
    "method": "int8", "perplexity": 15.1, "kl": 0.001, "top1": 0.99, "bytes_allocated": 10, "bytes_used": 8,
    "bytes_metadata": 1, "bits_per_value": 8.25, "times_smaller": 3.9, "prefill_s": 1.0, "compile_s": 2.0,
    "decode_tokens_per_s": 30.0, "decode_tokens_per_s_range": [29.0, 31.0], "decode_vs_full": 0.9, "note": "",
}  # fmt: skip
META = {
    "model": "m", "text": "t", "context": 64, "score": 16, "windows": 2, "stream": False, "seed": 0, "text_tokens": 99,
    "command": "c", "device": "d", "machine": "x", "versions": {"jax": "1"}, "started": "now", "cache_dtype": None,
}  # fmt: skip


def test_windows_are_evenly_spaced():
    windows = cut_windows(list(range(100)), context=20, score=5, windows=3)
    np.testing.assert_array_equal(windows[:, 0], [0, 33, 66])
    assert windows.shape == (3, 25)
    with pytest.raises(ValueError, match="the text has 100 tokens"):
        cut_windows(list(range(100)), context=30, score=5, windows=3)


def test_metrics_equal_their_definitions():
    p, q, targets = normal(0, 6, 11) * 3, normal(1, 6, 11) * 3, jnp.arange(6)
    nll, kl, top1 = compare_logits(p, q, targets)
    probs = [
        np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (np.asarray(p, np.float64), np.asarray(q, np.float64))
    ]
    assert float(nll) == pytest.approx(-np.log(probs[1][np.arange(6), np.arange(6)]).mean(), rel=1e-5)
    assert float(kl) == pytest.approx((probs[0] * np.log(probs[0] / probs[1])).sum(-1).mean(), rel=1e-5)
    assert float(top1) == (probs[0].argmax(-1) == probs[1].argmax(-1)).mean()


def test_results_resume_and_refuse_other_settings(tmp_path):
    file = tmp_path / "results.json"
    Results(file, META).add(ROW)
    again = Results(file, {**META, "command": "another", "started": "later"})
    assert again.row("int8") == ROW
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="context=64, this run has 128"):
        Results(file, {**META, "context": 128})
    file.write_text("{")
    with pytest.raises(ValueError, match="is not a results file"):
        Results(file, META)


def test_the_page_is_self_contained_and_says_what_the_results_say(tmp_path):
    full = {**ROW, "method": "full", "kl": 0.0, "bits_per_value": 32.0}
    (tmp_path / "results.json").write_text(json.dumps({"meta": META, "rows": [full, ROW]}))
    report.write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in page
    for row in (full, ROW):
        for cell in report.cells(row):
            assert f"<td>{cell}</td>" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "kivy"], "did you mean 'kivi'"),
        (["--methods", "kivi:group_size=48"], "group_size=48"),
        (["--context", "510"], "exceed the model's 512 positions"),
        (["--methods", "full", "--text", "/nowhere.txt"], "no such file"),
        (["--cache-dtype", "int8"], "must be float32, bfloat16 or float16"),
        (["--model", "/nowhere"], "no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, words, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    args = [
        "--model",
        "tests/golden/models/llama",
        "--text",
        str(text),
        "--context",
        "64",
        "--score",
        "16",
        "--decode-steps",
        "4",
        *options,
    ]
    assert run(compare.Config, compare.main, args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_tables_print(capsys):
    assert run(methods.Config, methods.main, []) == 0
    assert (
        run(
            memory.Config,
            memory.main,
            ["--model", "tests/golden/models/llama", "--context", "256", "--methods", "full;int8"],
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "kivi" in out
    assert "MB allocated" in out
