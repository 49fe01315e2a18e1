"""The code in the README does what the README says."""

import re
from pathlib import Path

import pytest

import kvcomp_jax as kvc
import models
from tests.experiments import tiny

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = {name: code for code in re.findall(r"```python\n(.*?)```", README, re.S)
          for name in ("generate", "open_prompt", "kvc.method") if name in code}  # fmt: skip


def run(code: str, **names) -> dict:
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_all_three_examples_are_found():
    assert set(BLOCKS) == {"generate", "open_prompt", "kvc.method"}
    assert len(re.findall(r"```python", README)) == 3
    assert len([line for line in BLOCKS["generate"].splitlines() if line]) <= 6
    assert len([line for line in BLOCKS["kvc.method"].splitlines() if line]) <= 30


def test_the_first_example_generates_with_a_smaller_cache(tmp_path, capsys):
    model = tiny.write_model(tmp_path)
    code = BLOCKS["generate"].replace('"smollm2"', repr(str(model)))
    answer = run(code)["answer"]
    assert answer.stats.cache.used < answer.stats.full.used / 2
    assert f"{answer.stats.cache.used} bytes instead of {answer.stats.full.used}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.real_model
def test_the_first_example_as_it_stands(capsys):
    answer = run(BLOCKS["generate"])["answer"]
    assert answer.stats.cache.used < answer.stats.full.used / 2
    assert "God" in answer.texts[0]
    assert capsys.readouterr().out.startswith(answer.texts[0])


def test_the_second_example_fills_and_steps_a_cache():
    names = run(BLOCKS["open_prompt"])
    cache, spec = names["cache"], names["spec"]
    assert int(cache.length[0]) == 1199
    full = 1199 * 2 * 2 * 64 * 2  # tokens, k and v, heads, head_dim, bytes
    assert kvc.nbytes(cache).used < full / 2
    assert spec.block_size == 128


def test_the_method_of_the_third_example_works_everywhere(tmp_path):
    try:
        names = run(BLOCKS["kvc.method"])
        held = kvc.forecast(names["plan"], [4096], "bfloat16")
        full = kvc.forecast(kvc.parse("full").plan(names["layout"], max_len=4096), [4096], "bfloat16")
        assert 3 < full.used / held.used < 4
        lm = models.load(tiny.write_model(tmp_path))
        answer = lm.generate([list(range(10, 150))], "fading:recent=64", max_new_tokens=100)
        assert answer.stats.cache.used < answer.stats.full.used / 2
        with pytest.raises(ValueError, match="recent=100"):
            kvc.parse("fading:recent=100").plan(names["layout"], max_len=4096)
        with pytest.raises(ValueError, match="did you mean 'recent'"):
            kvc.parse("fading:recnt=64")
    finally:
        kvc.METHODS.pop("fading", None)
