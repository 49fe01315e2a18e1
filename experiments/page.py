"""One self-contained page about an experiment: a table, plots inside it, and how it was measured."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

from experiments.results import write_atomically


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot: its heading, what it shows, its file."""

    title: str
    text: str
    file: Path


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder; pages are built on `page.html.jinja`, which needs `meta` of `cli.provenance`."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, loader=loader, undefined=jinja2.StrictUndefined)
    environment.filters["picture"] = lambda file: base64.b64encode(Path(file).read_bytes()).decode()
    return environment.get_template(template).render(**values)


def write(
    file: Path,
    meta: Mapping[str, Any],
    *,
    title: str,
    intro: Sequence[str],
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
    figures: Sequence[Figure],
    settings: Sequence[str],
) -> None:
    """Write a page.

    Args:
      file: To write.
      meta: Of the results.
      title, intro: Heading, and paragraphs that say what was asked and done.
      columns: Title and meaning of each.
      rows: Cells, one for each column.
      figures: In order.
      settings: Names in `meta` that are shown.
    """
    values = {"title": title, "intro": intro, "columns": columns, "rows": rows, "figures": figures}
    write_atomically(file, render("page.html.jinja", meta=meta, settings=settings, **values))


def show(console: Console, table: Table, files: Sequence[Path]) -> None:
    """Print a table as wide as it is, so that nothing is cut, and where the files are."""
    needed = Console(width=1000).measure(table).maximum
    Console(file=console.file, width=max(console.width, needed)).print(table)
    for file in files:
        console.print(file)
