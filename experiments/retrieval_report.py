"""What people read of a retrieval run: a table, heat maps, plots and a page, all made from results.json."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import page
from experiments.intervals import wilson
from experiments.report import plt, read

LEAST = 0.5  # a task whose full cache scores less says nothing about methods

_SETTINGS = ("text", "lengths", "depths", "cases", "query_aware", "cache_dtype", "seed")


def score(row: dict[str, Any], **where: Any) -> tuple[float, float, float, int]:
    """Mean score over the cases of a row that are so, its 95 % Wilson interval, and how many they are."""
    scores = [case["score"] for case in row["cases"] if all(case[name] == value for name, value in where.items())]
    if not scores:
        return math.nan, math.nan, math.nan, 0
    return (sum(scores) / len(scores), *wilson(sum(scores), len(scores)), len(scores))


def tasks_of(results: dict[str, Any]) -> list[str]:
    """Tasks in the order in which they were asked."""
    return list(dict.fromkeys(case["task"] for case in results["rows"][0]["cases"]))


def silent(results: dict[str, Any]) -> list[str]:
    """Tasks that say nothing, because the full cache fails them."""
    full = results["rows"][0]
    return [task for task in tasks_of(results) if score(full, task=task)[0] < LEAST]


def cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table; a task that says nothing is marked with †."""
    tasks, nothing, full = tasks_of(results), silent(results), results["rows"][0]
    longest = str(max(results["meta"]["lengths"]))
    rows = []
    for row in results["rows"]:
        smaller = full["bytes_used"][longest] / row["bytes_used"][longest]
        found = [score(row, task=task) for task in tasks]
        rows.append(
            [row["method"], f"{smaller:.2f}", *(f"{x:.2f} ({low:.2f}–{high:.2f})" for x, low, high, _ in found)]
        )
    return ["method", "× smaller", *(f"{task}†" if task in nothing else task for task in tasks)], rows


def write(folder: Path) -> None:
    """Write heatmaps.png, tasks.png and index.html beside results.json."""
    results = read(folder)
    figures = [
        page.Figure("Task by task", "Mean score and its 95 % interval; grey: the full cache.", folder / "tasks.png")
    ]
    plot_tasks(results, folder / "tasks.png")
    mapped = [task for task in tasks_of(results) if _depths(results, task)]
    if mapped:
        plot_heatmaps(results, mapped[0], folder / "heatmaps.png")
        text = f"Score of {mapped[0]} by where in the context the answer stands (0 is the beginning) and its length."
        figures.append(page.Figure("Where it was found", text, folder / "heatmaps.png"))
    headings, rows = cells(results)
    meanings = {
        "method": "How the cache is kept; options after the colon.",
        "× smaller": "Bytes of the full cache divided by the method's, of the longest contexts.",
    }
    other = "Share of the right answers that the model gave, and its 95 % Wilson interval over cases."
    turn = "together with the question" if results["meta"]["query_aware"] else "before the question was seen"
    page.write(
        folder / "index.html",
        results["meta"],
        title="Are the right tokens kept?",
        intro=[
            f"The model {results['meta']['model']} read contexts, their cache was compressed {turn}, and it then had "
            "to name what stands in them once, or is to be gathered from all of them. All methods had the same cases.",
            f"† Where the full cache scores below {LEAST}, the task is beyond the model and says nothing of methods.",
        ],
        columns=[(heading, meanings.get(heading, other)) for heading in headings],
        rows=rows,
        figures=figures,
        settings=_SETTINGS,
    )


def print_table(console: Console, folder: Path) -> None:
    """Print the table and where the files are; nothing is cut."""
    results = read(folder)
    headings, rows = cells(results)
    table = Table(title=f"{results['meta']['model']}: share of right answers", box=box.SIMPLE, pad_edge=False)
    for heading in headings:
        first = heading == "method"
        side = "left" if first else "right"
        table.add_column(heading.replace("_", " "), justify=side, no_wrap=first, min_width=len("0.00–1.00"))
    for row in rows:
        table.add_row(*(cell.replace(" (", "\n").replace(")", "") if i > 1 else cell for i, cell in enumerate(row)))
    needed = Console(width=1000).measure(table).minimum
    Console(file=console.file, width=max(console.width, needed)).print(table)
    for task in silent(results):
        console.print(f"† {task} says nothing: the full cache scores {score(results['rows'][0], task=task)[0]:.2f}")
    for name in ("results.json", "tasks.png", "heatmaps.png", "index.html"):
        if (folder / name).exists():
            console.print(folder / name)


def plot_tasks(results: dict[str, Any], file: Path) -> None:
    """One panel a task, one line a method."""
    tasks, nothing, rows = tasks_of(results), silent(results), results["rows"]
    figure, panels = _panels(len(tasks), (3.6, 0.9 + 0.28 * len(rows)))
    for axes, task in zip(panels, tasks, strict=True):
        found = [score(row, task=task) for row in rows]
        for y, (mean, low, high, _) in enumerate(found):
            color = "0.5" if rows[y]["method"] == "full" else f"C{y % 10}"
            axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3)
        axes.axvline(found[0][0], color="0.7", linestyle=":")
        axes.set_title(task.replace("_", " ") + (" †" if task in nothing else ""), fontsize=10)
        axes.set_xlim(-0.03, 1.03)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.grid(alpha=0.25, axis="x")
    figure.supxlabel("share of right answers; † says nothing", fontsize=9)
    _save(figure, file)


def plot_heatmaps(results: dict[str, Any], task: str, file: Path) -> None:
    """One map a method: depth against length."""
    lengths, depths = sorted(results["meta"]["lengths"]), _depths(results, task)
    figure, panels = _panels(len(results["rows"]), (1.6 + 0.6 * len(lengths), 1.3 + 0.36 * len(depths)))
    for axes, row in zip(panels, results["rows"], strict=True):
        found = np.array([[score(row, task=task, length=n, depth=depth)[0] for n in lengths] for depth in depths])
        image = axes.imshow(found, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (y, x), value in np.ndenumerate(found):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
        axes.set_title(row["method"], fontsize=8)
        axes.set_xlabel("tokens of context", fontsize=8)
        axes.set_ylabel("depth", fontsize=8)
    figure.colorbar(image, ax=panels, label=f"{task}: share found")
    _save(figure, file)


def _depths(results: dict[str, Any], task: str) -> list[float]:
    """Where the answers of a task stand; empty if in several places."""
    found = {case["depth"] for case in results["rows"][0]["cases"] if case["task"] == task}
    return sorted(depth for depth in found if depth is not None)


def _panels(num: int, size: tuple[float, float]) -> tuple[Any, Sequence[Any]]:
    """A figure with `num` panels of `size` inches, at most four in a row."""
    across = min(num, 4) if num != 6 else 3
    down = -(-num // across)
    figure, axes = plt.subplots(
        down, across, figsize=(size[0] * across, size[1] * down), dpi=120, squeeze=False, layout="constrained"
    )
    for unused in axes.flat[num:]:
        unused.axis("off")
    return figure, list(axes.flat[:num])


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file)
    plt.close(figure)
