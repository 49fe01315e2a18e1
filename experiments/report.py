"""What people read: a table, a plot and one self-contained page, all made from results.json."""

import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import page
from experiments.results import write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter


def read(folder: Path) -> dict[str, Any]:
    """Read results.json of a folder."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def write(folder: Path) -> None:
    """Write pareto.png and index.html beside results.json."""
    results = read(folder)
    plot(results, folder / "pareto.png")
    table = [(cells(row), row["note"]) for row in results["rows"]]
    picture = folder / "pareto.png"
    text = page.render("report.html.jinja", meta=results["meta"], table=table, picture=picture, columns=COLUMNS)
    write_atomically(folder / "index.html", text)


_NAMED = 10  # points of a plot whose names fit beside them

# Title, what it means.
COLUMNS = (
    ("method", "How the cache is kept; options after the colon."),
    ("bits / value", "Bits that one cached number really occupies, scales, positions and exact parts included."),
    ("× smaller", "Bytes of the full cache divided by the method's, counted from the arrays that hold it."),
    ("MB used", "Megabytes that the context's tokens occupy."),
    ("MB allocated", "Megabytes of all arrays, room for tokens still to come and those in host memory included."),
    ("perplexity", "How surprised the model is by the real text; lower is better."),
    ("KL", "How far the predictions move from the full cache's, in nats a token; 0 is identical."),
    ("top-1", "How often the most likely next token is the full cache's."),
    ("prefill s", "Seconds to read and compress the context (median over windows)."),
    ("decode tok/s", "Tokens generated a second: median, and lowest to highest."),
    ("× full speed", "Decoding speed against the full cache, measured in turn in the same process."),
    ("read by", "The operation and backend that read the compressed part in a decode step."),
    ("note", "What else to know."),
)

# Columns of the printed table, and their headings there.
_SHORT = {
    "method": "method",
    "bits / value": "bits",
    "× smaller": "smaller",
    "perplexity": "ppl",
    "KL": "KL",
    "top-1": "top-1",
    "decode tok/s": "tok/s",
    "× full speed": "× full",
}


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, one cell for each of COLUMNS."""
    low, high = row["decode_tokens_per_s_range"]
    return [
        row["method"],
        f"{row['bits_per_value']:.2f}",
        f"{row['times_smaller']:.2f}",
        f"{row['bytes_used'] / 1e6:.1f}",
        f"{row['bytes_allocated'] / 1e6:.1f}",
        f"{row['perplexity']:.3f}",
        f"{row['kl']:.5f}",
        f"{row['top1']:.3f}",
        f"{row['prefill_s']:.2f}",
        f"{row['decode_tokens_per_s']:.1f} ({low:.1f}–{high:.1f})",
        f"{row['decode_vs_full']:.2f}",
        row.get("kernel", ""),
        row["note"],
    ]


def print_table(console: Console, folder: Path) -> None:
    """Print the table and where the files are; 80 columns hold it, and nothing is cut where they do not."""
    results = read(folder)
    meta = results["meta"]
    title = f"{meta['model']}: context {meta['context']}, {meta['windows']} windows, {meta['device']}"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in _SHORT.values():
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    titles = [title for title, _ in COLUMNS]
    for row in results["rows"]:
        cell = dict(zip(titles, cells(row), strict=True))
        cell["decode tok/s"] = cell["decode tok/s"].partition(" ")[0]
        cell["method"] += f" ({row['note']})" if row["note"] else ""
        table.add_row(*(cell[title] for title in _SHORT))
    page.show(console, table, [folder / name for name in ("results.json", "pareto.png", "index.html")])


def plot(results: dict[str, Any], file: Path) -> None:
    """Quality lost against true bits: lower left is better."""
    rows = [row for row in results["rows"] if row["method"] != "full"]
    many = len(rows) > _NAMED
    figure, axes = plt.subplots(figsize=(12, max(5, 0.26 * len(rows))) if many else (8, 5), dpi=150)
    full = next((row for row in results["rows"] if row["method"] == "full"), None)
    if full is not None:
        axes.axvline(full["bits_per_value"], color="0.6", linestyle=":")
        axes.text(full["bits_per_value"], 0.98, " full cache (KL = 0)", transform=axes.get_xaxis_transform(), va="top",
                  ha="right", rotation=90, color="0.4", fontsize=9)  # fmt: skip
    best = _frontier(rows)
    axes.plot([r["bits_per_value"] for r in best], [_kl(r) for r in best], color="0.75", zorder=1)
    draw_points(axes, rows, full)
    axes.set_xscale("log", base=2)
    if rows:
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("true bits per cached value, everything counted (less is smaller)")
    axes.set_ylabel("KL to the full cache, nats a token (less is closer)")
    axes.set_title(f"{results['meta']['model']}: what a smaller cache costs, context {results['meta']['context']}")
    axes.margins(x=0.12, y=0.15)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def draw_points(axes: Any, rows: list[dict[str, Any]], full: dict[str, Any] | None) -> None:
    """A point a row, with its name beside it where there are few and with a number and a list where there are many."""
    if len(rows) > _NAMED:
        _number(axes, rows)
    else:
        _name(axes, rows, math.inf if full is None else full["bits_per_value"] / 3)


def _name(axes: Any, rows: list[dict[str, Any]], middle: float) -> None:
    """Points with their names beside them: on the left of those beyond `middle` bits."""
    for row in rows:
        x, y = row["bits_per_value"], _kl(row)
        axes.scatter(x, y, s=45, zorder=2)
        below = any(_close(row, other) and y < _kl(other) for other in rows if other is not row)
        offset = (-7 if x > middle else 7, -14 if below else 6)
        side = "right" if x > middle else "left"
        axes.annotate(_label(row), (x, y), xytext=offset, textcoords="offset points", ha=side, fontsize=9)


def _number(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Points with numbers, from the nearest to the full cache on, and a list of what they are; a colour a method."""
    families = list(dict.fromkeys(row["method"].split(":")[0] for row in rows))
    colours = plt.get_cmap("tab20")
    for number, row in enumerate(sorted(rows, key=_kl), 1):
        at = row["bits_per_value"], _kl(row)
        colour = colours(families.index(row["method"].split(":")[0]) % 20)
        axes.scatter(*at, s=120, color=colour, alpha=0.75, zorder=2, label=f"{number}  {_label(row)}")
        axes.annotate(str(number), at, ha="center", va="center", fontsize=7, zorder=3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _label(row: dict[str, Any]) -> str:
    """The method, with the names of its files but not their folders, which would not fit."""
    return re.sub(r"=[^,+=]*/", "=", row["method"])


def _close(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two points are so near that labels on the same side would collide."""
    near_x = max(a["bits_per_value"], b["bits_per_value"]) < 1.6 * min(a["bits_per_value"], b["bits_per_value"])
    return near_x and max(_kl(a), _kl(b)) < 5 * min(_kl(a), _kl(b))


def _kl(row: dict[str, Any]) -> float:
    """KL on a log axis: zero is drawn at the smallest value that float32 logits resolve."""
    return max(row["kl"], 1e-7)


def _frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other beats in both bits and KL, by bits."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["bits_per_value"], r["kl"])):
        if not best or row["kl"] < best[-1]["kl"]:
            best.append(row)
    return best
