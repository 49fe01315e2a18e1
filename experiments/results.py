"""Results on disk: one JSON file, replaced atomically after every row."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What may differ between two runs that share a file. Everything else must agree, versions and device included:
# speeds from two of them do not belong in one table.
_MAY_DIFFER = {"command", "started", "methods"}


class Results:
    """Rows by method, with the settings they were made with."""

    def __init__(self, file: Path, meta: Mapping[str, Any]) -> None:
        """Open `file`, keeping the rows of an interrupted run with the same settings.

        Raises:
          ValueError: If the file holds rows made with other settings, or is damaged.
          OSError: If its folder cannot be made or written to: better now than when the first row is measured.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(f"{file.parent} cannot be written to; choose another --out.")
        self.file, self.meta = file, dict(meta)
        self.rows: list[dict[str, Any]] = []
        if file.exists():
            self._resume()

    def row(self, method: str) -> dict[str, Any] | None:
        """The finished row of a method."""
        return next((row for row in self.rows if row["method"] == method), None)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a finished row, on disk before this returns."""
        self.rows.append(dict(row))
        self.write()

    def write(self) -> None:
        """Replace the file by what is held."""
        write_atomically(self.file, json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")

    def _resume(self) -> None:
        try:
            old = json.loads(self.file.read_text(encoding="utf-8"))
            old_meta, rows = old["meta"], old["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file} is not a results file; remove it or choose another --out.") from error
        for name in sorted((set(old_meta) | set(self.meta)) - _MAY_DIFFER):
            if old_meta.get(name) != self.meta.get(name):
                raise ValueError(
                    f"{self.file} holds results with {name}={old_meta.get(name)!r}, this run has "
                    f"{self.meta.get(name)!r}; remove it or choose another --out."
                )
        self.rows = rows


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, sees the old one or the new one whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
