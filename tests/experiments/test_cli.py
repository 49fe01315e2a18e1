import subprocess
import sys

import pytest

import kvcomp_jax as kvc
from experiments import compare, generate, memory, methods
from experiments.cli import run, split_methods
from tests.experiments import tiny

SIZES = ["--context", "64", "--score", "32", "--windows", "2", "--decode-steps", "4"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--methods", "kivy:bits=2"], "did you mean 'kivi'"),
        (["--methods", "kivi:bit=2"], "did you mean 'bits'"),
        (["--methods", "kivi:bits=two"], "bits='two'"),
        (["--methods", "kivi:bits=5"], "bits=5"),
        (["--methods", "kivi:group_size=7"], "group_size=7"),
        (["--methods", "streaming_llm:budget=4"], "num_sinks=4"),
        (["--methods", "h2o:budget=8,num_sinks=4,recent=8"], "budget=8"),
        (["--methods", "h2o:budget=1.5"], "1.5"),
        (["--methods", ";"], "no method"),
        (["--context", "500"], "512 positions"),
        (["--context", "0"], "context=0"),
        (["--score", "1", "--decode-steps", "1"], "score=1"),
        (["--windows", "20"], "1000 tokens"),
        (["--windows", "two"], "--windows"),
        (["--repeats", "0"], "repeats=0"),
        (["--decode-steps", "64"], "decode_steps=64"),
        (["--cache-dtype", "int3"], "int3"),
        (["--contxt", "64"], "did you mean --context"),
        (["--text", "no/such/file.txt"], "no/such/file.txt"),
        (["--model", "no_such_model"], "no_such_model"),
        (["--out", __file__], "test_cli.py"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(model_folder, text_file, tmp_path, capsys, args, named):
    good = ["--model", str(model_folder), "--text", str(text_file), "--out", str(tmp_path), "--methods", "full", *SIZES]
    assert run(compare.Config, compare.main, [*good, *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize(
    ("script", "args", "named"),
    [
        (memory, ["--batch", "0"], "batch=0"),
        (memory, ["--methods", "h2o:budgt=4"], "did you mean 'budget'"),
        (memory, ["--cache-dtype", "int8"], "int8"),
        (generate, ["hello", "--method", "kivi:bits=9"], "bits=9"),
        (generate, ["hello", "--temperature", "-1"], "temperature"),
        (generate, ["hello", "--max-new-tokens", "9999"], "512 positions"),
        (generate, [""], "empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_scripts_too(model_folder, capsys, script, args, named):
    assert run(script.Config, script.main, ["--model", str(model_folder), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error


def test_a_missing_argument_is_one_line(capsys):
    assert run(compare.Config, compare.main, []) == 2
    error = capsys.readouterr().err
    assert "--text" in error
    assert error.count("\n") == 1


def test_a_process_exits_with_2_and_no_traceback():
    args = [sys.executable, "-m", "experiments.memory", "--methods", "kivy"]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert "kivi" in done.stderr


def test_a_bug_keeps_its_traceback():
    def broken(config):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(methods.Config, broken, [])


def test_all_of_a_kind_are_listed_in_the_settings_of_their_sources():
    listed = split_methods("full;all-quantising;int4")
    wanted = {name for name, info in kvc.METHODS.items() if info.axis == "quantise"}
    assert {kvc.parse(text).name for text in listed} == {"full"} | wanted
    assert len(listed) == len(set(listed))
    settings = sum(len(info.settings) for info in kvc.METHODS.values() if info.axis == "quantise")
    assert len(listed) == settings + 1  # int4 is among them
    assert "kivi:bits=4" in listed
    assert "full" in split_methods("all")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        run(compare.Config, compare.main, ["--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    for option in (
        "--model",
        "--text",
        "--methods",
        "--context",
        "--score",
        "--windows",
        "--out",
        "--stream",
        "--seed",
    ):
        assert option in shown


def test_sizes_of_the_tiny_model_are_what_these_tests_assume(text_file):
    assert len(text_file.read_text()) == 1000
    assert tiny.METHODS.startswith("full;")
