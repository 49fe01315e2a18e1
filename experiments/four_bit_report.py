"""What people read of a model in 4 bits: a table, bars and a page, all made from results.json."""

from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import page
from experiments.report import plt, read

COLUMNS = (
    ("model", "W: bits of weights, A: of activations; rounded to the nearest unless GPTQ is said."),
    ("cache", "How the cache is kept."),
    ("perplexity", "Of the windows; lower is better."),
    ("KL", "From the model as it was loaded, nats a token."),
    ("largest change", "Of any logit."),
    ("weights MB", "Megabytes of all parameters, embeddings included."),
    ("bits/value", "Of the cache, everything counted."),
)
_SETTINGS = (
    "text", "bits", "down_bits", "context", "score", "windows", "calibration", "calibration_tokens", "seed",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, one cell for each of COLUMNS."""
    return [
        row["model"],
        row["cache"],
        f"{row['perplexity']:.3f}",
        f"{row['kl']:.4f}",
        f"{row['largest_change']:.1e}",
        f"{row['weight_bytes'] / 1e6:.1f}",
        f"{row['bits_per_value']:.2f}",
    ]


def write(folder: Path) -> None:
    """Write four_bit_model.png and index.html beside results.json."""
    results = read(folder)
    plot(results, folder / "four_bit_model.png")
    meta = results["meta"]
    page.write(
        folder / "index.html",
        meta,
        title=f"What is left of a model in {meta['bits']} bits?",
        intro=[
            f"The weights of {meta['model']} were rotated and rounded, by GPTQ on the first half of the text, and its "
            f"activations and cache rounded; {meta['windows']} windows of the second half were scored.",
        ],
        columns=COLUMNS,
        rows=[cells(row) for row in results["rows"]],
        figures=[page.Figure("Perplexity", "The line is the model as it was loaded.", folder / "four_bit_model.png")],
        settings=_SETTINGS,
    )


def print_table(console: Console, folder: Path) -> None:
    """Print the table and where the files are; nothing is cut."""
    results = read(folder)
    table = Table(title=f"{results['meta']['model']} in {results['meta']['bits']} bits", box=box.SIMPLE)
    for title, _ in COLUMNS:
        table.add_column(title, justify="left" if title in ("model", "cache") else "right")
    for row in results["rows"]:
        table.add_row(*cells(row))
    page.show(console, table, [folder / name for name in ("results.json", "four_bit_model.png", "index.html")])


def plot(results: dict[str, Any], file: Path) -> None:
    """Perplexity, a bar each, the first row on top."""
    rows = results["rows"]
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.36 * len(rows)), dpi=150, layout="constrained")
    names = [f"{row['model']}, {row['cache']}" for row in rows]
    bars = axes.barh(names, [row["perplexity"] for row in rows], color=["C0" if row["cache"] == "full" else "C1"
                                                                        for row in rows])  # fmt: skip
    axes.bar_label(bars, [f" {row['perplexity']:.1f}" for row in rows], fontsize=8)
    axes.axvline(rows[0]["perplexity"], color="0.5", linestyle="--")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(row["perplexity"] for row in rows) / 1.3, max(row["perplexity"] for row in rows) * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("perplexity; orange: the cache in 4 bits, too")
    axes.set_title(
        f"{results['meta']['model']}: weights (W), activations (A) and cache in {results['meta']['bits']} bits"
    )
    figure.savefig(file)
    plt.close(figure)
