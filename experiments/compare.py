"""Compare methods on a real model and text: quality against true bytes, and speed.

Prefills a context, compresses its cache, and scores the tokens that follow. Writes results.json, pareto.png and
index.html; an interrupted run goes on where it stopped.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvcomp_jax as kvc
import models
from experiments import report
from experiments.calibrate import made_with
from experiments.cli import GROUPS, provenance, run, split_methods
from experiments.measure import Bench, saves
from experiments.protocol import Score, cut_windows
from experiments.results import Results
from experiments.texts import load_text, sha256
from kvcomp_jax.calibrate import NotCalibrated, load, locate
from models.programs import forgetting

DEFAULT_METHODS = "full;int8;int4;kivi:bits=4;kivi:bits=2;streaming_llm:budget=512;h2o:budget=512"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare."""

    text: Path
    """A text file, or the King James Bible as kjv.jsonl."""
    model: str = "smollm2"
    """What `models.load` takes: a folder, a .gguf file, "smollm2"."""
    methods: str = DEFAULT_METHODS
    """Methods, separated by semicolons; "full" is always measured. "all-quantising" or "all-selecting" is every one."""
    context: int = 1024
    """Tokens prefilled and compressed."""
    score: int = 256
    """Tokens after them; one less is predicted."""
    windows: int = 6
    """Evenly spaced places in the text."""
    out: Path = Path("runs/compare")
    """Folder for the results."""
    stream: bool = False
    """Feed the scored tokens one at a time through decode instead of in one pass."""
    seed: int = 0
    """Kept with the results; nothing here is random."""
    cache_dtype: str | None = None
    """Of exact cached tokens: float32, bfloat16 or float16; None is the model's."""
    decode_steps: int = 24
    """Tokens of one speed measurement."""
    repeats: int = 3
    """Speed measurements of a method, in turn with the full cache."""


def main(config: Config) -> None:
    """Run the comparison and write its report."""
    console = Console()
    methods = list(dict.fromkeys(["full", *split_methods(config.methods)]))
    layout = models.load_layout(config.model)
    methods, missing = calibrated(config, layout, methods)
    for reason in missing:
        console.print(f"left out: {reason}")
    check(config, layout, methods)
    text = load_text(config.text)
    with console.status(f"loading {config.model}"):
        lm = models.load(config.model)
    if lm.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; a comparison on text needs one.")
    with console.status("reading the text"):
        tokens = lm.tokenizer.encode(text)
    every = list(range(len(tokens)))
    places = cut_windows(every, context=config.context, score=config.score, windows=config.windows)
    windows = np.asarray(tokens, np.int32)[places]
    results = Results(config.out / "results.json", _meta(config, methods, len(tokens), windows))
    todo = [method for method in methods if results.row(method) is None]
    if todo:
        bench = Bench(lm, config, windows)
        seen = {method for method in todo if calibrated_on(method, layout, text, places)}
        _measure(console, bench, results, todo, seen)
    results.rows.sort(key=lambda row: methods.index(row["method"]) if row["method"] in methods else len(methods))
    results.write()
    report.write(config.out)
    report.print_table(console, config.out)


def calibrated(config: Config, layout: kvc.Layout, methods: list[str]) -> tuple[list[str], list[str]]:
    """Of all methods of a kind, those that are calibrated where they must be, and why others are not among them.

    Methods named one by one are all kept: `check` complains.
    """
    kept, missing = [], []
    grouped = any(part.strip() in GROUPS for part in config.methods.split(";"))
    for method in methods:
        try:
            if grouped:
                kvc.parse(method).plan(layout, max_len=config.context + config.score, prompt_len=config.context)
        except NotCalibrated as reason:
            missing.append(str(reason))
        else:
            kept.append(method)
    return kept, missing


def calibrated_on(method: str, layout: kvc.Layout, text: str, places: np.ndarray) -> bool:
    """Whether a method was calibrated on this very text, and on any of its tokens at `places`."""
    for name, options in kvc.parse(method).parts:
        info, given = kvc.METHODS[name], dict(options)
        if info.calibration:
            file = locate(given.get("calibration", "auto"), name, made_with(info, given), layout)
            made = load(file)[1].provenance
            first, end = made.get("tokens_read", (0, 0))
            if made.get("text_sha256") == sha256(text) and ((first <= places) & (places < end)).any():
                return True
    return False


def check(config: Config, layout: kvc.Layout, methods: list[str]) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    size = config.context + config.score
    if layout.max_positions is not None and size > layout.max_positions:
        raise ValueError(
            f"context={config.context} + score={config.score} tokens exceed the model's "
            f"{layout.max_positions} positions."
        )
    if not 1 <= config.decode_steps <= config.score:
        raise ValueError(f"decode_steps={config.decode_steps} must be between 1 and score={config.score}.")
    if config.repeats < 1:
        raise ValueError(f"repeats={config.repeats} must be at least 1.")
    if config.cache_dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"cache_dtype={config.cache_dtype!r} must be float32, bfloat16 or float16.")
    for method in methods:
        kvc.parse(method).plan(layout, max_len=size, prompt_len=config.context)


def _meta(config: Config, methods: list[str], num_tokens: int, windows: np.ndarray) -> dict[str, Any]:
    return {
        **provenance(config, "compare"),
        "methods": methods,
        "text_tokens": num_tokens,
        "windows_sha256": hashlib.sha256(windows.tobytes()).hexdigest(),  # of the scored tokens, int32
    }


def _measure(console: Console, bench: Bench, results: Results, todo: list[str], seen: set[str]) -> None:
    """Add a row for each method of `todo`; those in `seen` were calibrated on what is scored."""
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("full cache (reference)", total=len(bench.windows) * (len(todo) + 1))
        bench.prepare_reference(lambda: progress.advance(bar))
        for method in todo:
            progress.update(bar, description=method)
            with forgetting():
                scores, measured = bench.measure(method, lambda: progress.advance(bar))
            results.add(_row(method, scores, measured, bench, method in seen))


def _row(method: str, scores: list[Score], measured: dict[str, Any], bench: Bench, seen: bool) -> dict[str, Any]:
    held: kvc.Bytes = measured.pop("bytes")
    layout = bench.lm.config.layout
    values = 2 * bench.config.context * layout.num_layers * layout.num_kv_heads * layout.head_dim
    return {
        "method": method,
        "perplexity": float(np.exp(np.mean([s.nll for s in scores]))),
        "kl": float(np.mean([s.kl for s in scores])),
        "top1": float(np.mean([s.top1 for s in scores])),
        "bytes_allocated": held.allocated,
        "bytes_used": held.used,
        "bytes_metadata": held.metadata,
        "bytes_host": held.host,
        "bits_per_value": 8 * held.used / values,
        "times_smaller": bench.full_bytes.used / held.used,
        "kernel": measured.pop("kernel"),
        **measured,
        "note": _note(method, held, measured, bench, seen),
        "windows": [dataclasses.asdict(s) for s in scores],
    }


def _note(method: str, held: kvc.Bytes, measured: dict[str, Any], bench: Bench, seen: bool) -> str:
    """What the table says of a method beside its figures."""
    parts = []
    if held.host:
        parts.append(f"{held.host / 1e6:.1f} MB of it on the host")
    elif method != "full" and not saves(held, bench.full_bytes):
        parts.append("no bytes saved")
    if "recall_hit_rate" in measured:
        hits, moved = measured["recall_hit_rate"], measured["recall_bytes_per_step"]
        parts.append(f"{hits:.0%} of pages wanted at hand, {moved / 1e3:.1f} kB recalled a step")
    if seen:
        parts.append("calibrated on scored tokens")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(run(Config, main))
