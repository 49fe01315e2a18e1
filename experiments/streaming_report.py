"""What people read of a streaming run: a table, curves and a page, all made from results.json."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import page
from experiments.report import plt, read

COLUMNS = (
    ("method", "How the cache is kept; options after the colon."),
    ("perplexity", "How surprised the model is by the stream; lower is better."),
    ("first quarter", "The same over the stream's first quarter."),
    ("last quarter", "The same over its last."),
    ("MB used", "Megabytes that the cache occupies at the end."),
    ("MB allocated", "Megabytes of all its arrays, which never grow."),
    ("tok/s", "Tokens fed a second, compilation apart."),
    ("programs", "Compilations that feeding took."),
)
_SETTINGS = ("text", "source", "prompt", "tokens", "chunk", "every", "temperature", "cache_dtype", "seed")


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, one cell for each of COLUMNS."""
    nll, last = [point["nll"] for point in row["curve"]], row["curve"][-1]
    quarter = -(-len(nll) // 4)
    shown = [np.exp(np.mean(part)) for part in (nll, nll[:quarter], nll[-quarter:])]
    return [
        row["method"],
        *(f"{value:.2f}" for value in shown),
        f"{last['bytes_used'] / 1e6:.2f}",
        f"{last['bytes_allocated'] / 1e6:.2f}",
        f"{row['tokens_per_s']:.1f}",
        str(row["programs"]),
    ]


def write(folder: Path) -> None:
    """Write stream.png and index.html beside results.json."""
    results = read(folder)
    plot(results, folder / "stream.png")
    meta = results["meta"]
    own = f"{meta['tokens']} tokens that the model wrote itself with the full cache"
    fed = own if meta["source"] == "own" else f"{meta['tokens']} tokens of a text"
    how = "one at a time" if meta["chunk"] == 1 else f"{meta['chunk']} at a time"
    figure = page.Figure("As it grows", "Each point is the mean over the tokens before it.", folder / "stream.png")
    page.write(
        folder / "index.html",
        meta,
        title="What does a long stream cost?",
        intro=[f"The model {meta['model']} read {meta['prompt']} tokens, and was then fed {fed}, {how}."],
        columns=COLUMNS,
        rows=[cells(row) for row in results["rows"]],
        figures=[figure],
        settings=_SETTINGS,
    )


def print_table(console: Console, folder: Path) -> None:
    """Print the table and where the files are; nothing is cut."""
    results = read(folder)
    table = Table(title=f"{results['meta']['model']}: {results['meta']['tokens']} tokens", box=box.SIMPLE)
    for title, _ in COLUMNS:
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in results["rows"]:
        table.add_row(*cells(row))
    page.show(console, table, [folder / name for name in ("results.json", "stream.png", "index.html")])


def plot(results: dict[str, Any], file: Path) -> None:
    """Perplexity above, memory below, over the tokens so far."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), dpi=150, sharex=True, layout="constrained")
    for row in results["rows"]:
        at = [point["tokens"] for point in row["curve"]]
        style = {"color": "0.5", "linestyle": "--"} if row["method"] == "full" else {}
        above.plot(at, np.exp([point["nll"] for point in row["curve"]]), marker=".", label=row["method"], **style)
        below.plot(at, [point["bytes_used"] / 1e6 for point in row["curve"]], marker=".", **style)
    for axes, title in ((above, "perplexity"), (below, "cache, MB used")):
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
    lowest, highest = above.get_ylim()
    if highest > 4 * lowest:
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        above.yaxis.set_minor_formatter(NullFormatter())
    below.set_ylim(bottom=0)
    above.set_title(f"{results['meta']['model']}: a stream through the cache")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    below.set_xlabel("tokens so far")
    figure.savefig(file)
    plt.close(figure)
