"""What people read of a batching run: a table, slots over time and a page, all made from results.json."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import page
from experiments.report import plt, read

COLUMNS = (
    ("method", "How the cache is kept; options after the colon."),
    ("requests", "Served."),
    ("mismatches", "Requests that got other tokens than alone; must be 0."),
    ("programs", "Compilations of the decode step, whoever joined or left."),
    ("steps", "Decode steps of the batch."),
    ("slots used", "Mean over steps."),
    ("tok/s", "New tokens a second, prompts included, programs of all shapes compiled before."),
    ("alone tok/s", "The same, one request after the other through the same programs."),
    ("MB allocated", "Megabytes of the caches of all slots."),
)
_SETTINGS = ("text", "requests", "slots", "prompt", "new", "gap", "cache_dtype", "seed")


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, one cell for each of COLUMNS."""
    counts = [str(row[name]) for name in ("requests", "mismatches", "programs", "steps")]
    rates = [f"{row[name]:.1f}" for name in ("tokens_per_s", "alone_tokens_per_s")]
    return [row["method"], *counts, f"{row['slots_used']:.2f}", *rates, f"{row['bytes_allocated'] / 1e6:.1f}"]


def write(folder: Path) -> None:
    """Write slots.png and index.html beside results.json."""
    results = read(folder)
    meta = results["meta"]
    plot(results, folder / "slots.png")
    text = "Live slots after each step, and tokens a second over the last 16 steps; prompts are read between steps."
    page.write(
        folder / "index.html",
        meta,
        title="Do rows that come and go disturb one another?",
        intro=[
            f"{meta['requests']} requests came to the model {meta['model']}, each of {meta['prompt'][0]} to "
            f"{meta['prompt'][1]} tokens, wanting {meta['new'][0]} to {meta['new'][1]} more. They went through "
            f"{meta['slots']} slots of one batch, and then one by one: what each got was compared token by token."
        ],
        columns=COLUMNS,
        rows=[cells(row) for row in results["rows"]],
        figures=[page.Figure("Slots and speed", text, folder / "slots.png")],
        settings=_SETTINGS,
    )


def print_table(console: Console, folder: Path) -> None:
    """Print the table and where the files are; nothing is cut."""
    results = read(folder)
    meta = results["meta"]
    table = Table(title=f"{meta['model']}: {meta['requests']} requests, {meta['slots']} slots", box=box.SIMPLE)
    for title, _ in COLUMNS:
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in results["rows"]:
        table.add_row(*cells(row))
    page.show(console, table, [folder / name for name in ("results.json", "slots.png", "index.html")])


def plot(results: dict[str, Any], file: Path) -> None:
    """Slots in use and tokens a second over time, one panel a method."""
    rows, slots = results["rows"], results["meta"]["slots"]
    figure, panels = plt.subplots(
        len(rows), 1, figsize=(8, 3 * len(rows)), dpi=150, squeeze=False, layout="constrained"
    )
    for axes, row in zip(panels[:, 0], rows, strict=True):
        seconds, live, made = np.array(row["trace"]).T
        axes.fill_between(seconds, live, step="post", color="C0", alpha=0.35, linewidth=0)
        axes.set_ylim(0, slots + 0.5)
        axes.set_ylabel("slots in use", color="C0")
        axes.set_title(
            f"{row['method']}: {row['mismatches']} of {row['requests']} requests differ from alone", fontsize=9
        )
        speed, back = axes.twinx(), min(16, len(made) - 1)
        if back > 0:
            rate = (made[back:] - made[:-back]) / (seconds[back:] - seconds[:-back])
            speed.plot(seconds[back:], rate, color="C1", linewidth=1)
        speed.set_ylim(bottom=0)
        speed.set_ylabel("tokens/s", color="C1")
        axes.grid(alpha=0.25)
    panels[-1, 0].set_xlabel("seconds")
    figure.savefig(file)
    plt.close(figure)
