"""Serve requests that come and go in the slots of one batch, and check each against the same request alone.

Prompts of random lengths are cut out of a text, arrive at random times and want random numbers of tokens. Rows start
and end while others decode, in one compiled step. Writes results.json, slots.png and index.html.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvcomp_jax as kvc
import models
from experiments import batching_report
from experiments.cli import provenance, run, split_methods
from experiments.results import Results
from experiments.texts import load_text
from kvcomp_jax.serving import Engine, Request
from models.batching import decode_step, make_engine
from models.programs import count


@dataclasses.dataclass(frozen=True)
class Config:
    """What to serve, and how."""

    text: Path
    """A text file, or the King James Bible as kjv.jsonl: prompts are cut out of it."""
    model: str = "smollm2"
    """What `models.load` takes."""
    methods: str = "snapstream:budget=0.5"
    """Methods, separated by semicolons."""
    requests: int = 64
    """How many come."""
    slots: int = 8
    """Decoded together."""
    prompt: tuple[int, int] = (32, 256)
    """Fewest and most tokens of a prompt."""
    new: tuple[int, int] = (8, 64)
    """Fewest and most tokens that a request wants."""
    gap: float = 4.0
    """Steps between two arrivals, on average; 0: all wait from the start."""
    seed: int = 0
    """Of the requests."""
    out: Path = Path("runs/batching")
    """Folder for the results."""
    cache_dtype: str | None = None
    """Of exact cached tokens: float32, bfloat16 or float16; None is the model's."""


def main(config: Config) -> None:
    """Serve through every method and write the report."""
    console = Console()
    methods = split_methods(config.methods)
    check(config, models.load_layout(config.model), methods)
    text = load_text(config.text)
    with console.status(f"loading {config.model}"):
        lm = models.load(config.model)
    if lm.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; prompts from a text need one.")
    requests = draw(config, lm.tokenizer.encode(text))
    results = Results(config.out / "results.json", {**provenance(config, "batching"), "methods": methods})
    todo = [method for method in methods if results.row(method) is None]
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=2 * len(requests) * len(todo), visible=bool(todo))
        for i, method in enumerate(todo):
            done = 2 * len(requests) * i
            progress.update(bar, description=method, completed=done)
            row = serve(lm, method, config, requests, lambda n, done=done: progress.update(bar, completed=done + n))
            results.add(row)
    results.rows.sort(key=lambda row: methods.index(row["method"]) if row["method"] in methods else len(methods))
    results.write()
    batching_report.write(config.out)
    batching_report.print_table(console, config.out)


def check(config: Config, layout: kvc.Layout, methods: list[str]) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    for name in ("requests", "slots"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    for name in ("prompt", "new"):
        low, high = getattr(config, name)
        if not 1 <= low <= high:
            raise ValueError(f"{name}={low} {high} must be a least and a most number of tokens, both at least 1.")
    if config.gap < 0:
        raise ValueError(f"gap={config.gap} must not be negative.")
    if config.cache_dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"cache_dtype={config.cache_dtype!r} must be float32, bfloat16 or float16.")
    size = config.prompt[1] + config.new[1]
    if layout.max_positions is not None and size > layout.max_positions:
        raise ValueError(
            f"prompt={config.prompt[1]} + new={config.new[1]} tokens exceed the model's "
            f"{layout.max_positions} positions."
        )
    for method in methods:
        kvc.parse(method).plan(layout, max_len=size, prompt_len=config.prompt[1])


def draw(config: Config, tokens: list[int]) -> list[Request]:
    """Requests in the order in which they come."""
    if len(tokens) <= config.prompt[1]:
        raise ValueError(f"the text has {len(tokens)} tokens, prompts up to {config.prompt[1]}; take a longer text.")
    rng = np.random.default_rng(config.seed)
    arrivals = np.cumsum(rng.exponential(config.gap, config.requests)) if config.gap else np.zeros(config.requests)
    requests = []
    for arrival in arrivals:
        length, new = (int(rng.integers(low, high + 1)) for low, high in (config.prompt, config.new))
        start = int(rng.integers(len(tokens) - length))
        requests.append(Request(tuple(tokens[start : start + length]), new, int(arrival)))
    return requests


def serve(lm: models.LanguageModel, method: str, config: Config, requests: list[Request], show: Any) -> dict[str, Any]:
    """Serve all together and then each alone: the row of results. `show` is called with requests finished.

    Alone, a request has the batch to itself; before either is timed, one request of every padded length is served.
    """
    options = {"num_slots": config.slots, "cache_dtype": config.cache_dtype}
    before = count(decode_step)
    make_engine(lm, method, requests, **options).run(
        [dataclasses.replace(r, arrival=0) for r in _one_a_shape(requests)]
    )
    engine, trace, start = make_engine(lm, method, requests, **options), [], time.perf_counter()

    def watch(engine: Engine) -> None:
        live = sum(number is not None for number in engine.slots)
        trace.append([time.perf_counter() - start, live, sum(map(len, engine.outputs))])
        show(engine.num_finished)

    outputs = engine.run(requests, watch)
    together_s, start = time.perf_counter() - start, time.perf_counter()
    single, alone = make_engine(lm, method, requests, **options), []
    for i, request in enumerate(requests):
        alone.append(single.run([dataclasses.replace(request, arrival=0)])[-1])
        show(len(requests) + i + 1)
    alone_s, made = time.perf_counter() - start, sum(map(len, outputs))
    return {
        "method": method,
        "requests": len(requests),
        "mismatches": sum(a != b for a, b in zip(outputs, alone, strict=True)),
        "programs": count(decode_step) - before,
        "steps": engine.steps,
        "slots_used": float(np.mean([live for _, live, _ in trace])),
        "tokens": made,
        "tokens_per_s": made / together_s,
        "alone_tokens_per_s": made / alone_s,
        "bytes_allocated": kvc.nbytes(engine.caches).allocated,
        "trace": trace,
    }


def _one_a_shape(requests: list[Request]) -> list[Request]:
    """A request of every padded length, see `models.generate.prefill`, at once."""
    found = {-(-len(request.prompt) // 64): request for request in requests}
    return [dataclasses.replace(request, arrival=0) for request in found.values()]


if __name__ == "__main__":
    sys.exit(run(Config, main))
