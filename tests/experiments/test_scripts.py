import jax.numpy as jnp
import pytest
from rich.console import Console

import kvcomp_jax as kvc
import models
from experiments import generate, memory, methods
from experiments.cli import run
from models.generate import prefill

SMALL = [
    "full:block_size=16",
    "int8:block_size=16",
    "int4:block_size=16",
    "kivi:bits=4,group_size=16,residual=32",
    "kivi:bits=2,group_size=16,residual=32",
    "streaming_llm:budget=40",
    "h2o:budget=0.5",
    "h2o:budget=90+int4",
]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("method", SMALL)
def test_the_forecast_is_what_the_cache_then_holds(model_folder, method):
    lm = models.load(model_folder)
    config = memory.Config(model=str(model_folder), context=100, batch=2, cache_dtype="float16")
    plan = kvc.parse(method).plan(lm.config.layout, max_len=100, prompt_len=100)
    prompts = [list(range(10, 110))] * 2
    _, caches, _, _ = prefill(lm, prompts, plan.init(batch=2, dtype=jnp.float16, prompt_lens=[100, 100]))
    assert memory.forecast(method, lm.config.layout, config) == kvc.nbytes(caches)


def test_memory_shows_megabytes_without_loading_weights(model_folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())  # and no tensors
    args = [
        "--model",
        str(tmp_path),
        "--context",
        "4096",
        "--batch",
        "8",
        "--cache-dtype",
        "float32",
        "--methods",
        ";".join(SMALL),
    ]
    assert run(memory.Config, memory.main, args) == 0
    lines = capsys.readouterr().out.splitlines()
    for method in SMALL:
        assert any(method in line for line in lines)
    full = 8 * 4096 * 2 * 3 * 2 * 16 * 4  # rows, tokens, k and v, layers, kv heads, head_dim, bytes
    row = next(line for line in lines if "full" in line)
    assert float(row.split("│")[2]) == pytest.approx(full / 1e6, rel=1e-3)
    assert any("512 positions" in line for line in lines)


def test_the_table_of_methods_lists_all_with_their_options(capsys):
    assert run(methods.Config, methods.main, []) == 0
    shown = capsys.readouterr().out
    for info in kvc.METHODS.values():
        assert info.name in shown
        assert all(option in shown for option in info.options)


def test_generate_streams_the_text_and_then_says_what_the_cache_took(model_folder, capsys):
    args = ["--model", str(model_folder), "--method", "streaming_llm:budget=16", "--max-new-tokens", "24"]
    assert run(generate.Config, generate.main, ["the quick brown fox jumps", *args]) == 0
    out, figures = capsys.readouterr()
    lm = models.load(model_folder)
    expected = lm.generate(["the quick brown fox jumps"], "streaming_llm:budget=16", max_new_tokens=24)
    assert out == f"{expected.texts[0]}\n"
    cache = expected.stats.cache
    for shown in (f"{cache.used / 1e6:.3f} MB used", f"{cache.allocated / 1e6:.3f} MB allocated", "tokens/s"):
        assert shown in " ".join(figures.split())


def test_generate_says_when_nothing_was_saved(model_folder, capsys):
    args = ["--model", str(model_folder), "--method", "streaming_llm:budget=64", "--max-new-tokens", "4"]
    assert run(generate.Config, generate.main, ["short", *args]) == 0
    assert "no bytes saved" in capsys.readouterr().err


def test_console_width_is_wide_here():
    assert Console().width == 200
