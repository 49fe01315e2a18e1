"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

import kvcomp_jax as kvc

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)


def test_there_are_examples():
    assert len(BLOCKS) == 2
    assert len(BLOCKS[0].strip().splitlines()) == 6
    assert len(BLOCKS[1].strip().splitlines()) <= 30


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_run(block):
    try:
        exec(compile(block, "README.md", "exec"), {})
    finally:
        kvc.METHODS.pop("keys_first", None)
