"""Ask for what stands in a long context, to see whether a method kept the right tokens.

Needles in a haystack, lines of keys and values, several keys, several questions, chains of variables, common words:
made offline on a text. A context is read and compressed before its question is seen, unless --query-aware. Writes
results.json, heatmaps.png, tasks.png and index.html; an interrupted run goes on where it stopped.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvcomp_jax as kvc
import models
from experiments import retrieval_report
from experiments.cli import provenance, run, split_methods
from experiments.results import Results
from experiments.retrieval_tasks import TASKS, Case, Source, make_cases
from experiments.texts import load_text
from models import decode_loop
from models.generate import prefill
from models.programs import compiled, forgetting
from models.sampling import Sampling
from models.transformer import Transformer

DEFAULT_METHODS = (
    "full;snapkv:budget=0.5;expected_attention:budget=0.5;h2o:budget=0.5;streaming_llm:budget=0.5;"
    "snapkv:budget=0.5+kivi:bits=4;kivi:bits=4"
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to ask, and whom."""

    text: Path
    """The hay: a text file, or the King James Bible as kjv.jsonl."""
    model: str = "smollm2"
    """What `models.load` takes."""
    methods: str = DEFAULT_METHODS
    """Methods, separated by semicolons; "full" is always asked."""
    tasks: str = ";".join(TASKS)
    """Tasks, separated by semicolons."""
    lengths: tuple[int, ...] = (512, 1024, 2048)
    """Tokens of a context."""
    depths: int = 5
    """Evenly spaced places, beginning and end among them, where the answer stands."""
    cases: int = 20
    """Of each task and length; they go through the depths in turn."""
    batch: int = 4
    """Cases read together."""
    query_aware: bool = False
    """Compress the question together with the context, instead of asking it of what was compressed before."""
    out: Path = Path("runs/retrieval")
    """Folder for the results."""
    seed: int = 0
    """Of the cases."""
    cache_dtype: str | None = None
    """Of exact cached tokens: float32, bfloat16 or float16; None is the model's."""


def main(config: Config) -> None:
    """Ask every method and write the report."""
    console = Console()
    methods = list(dict.fromkeys(["full", *split_methods(config.methods)]))
    check(config, models.load_layout(config.model), methods)
    text = load_text(config.text)
    with console.status(f"loading {config.model}"):
        lm = models.load(config.model)
    if lm.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; questions about a text need one.")
    cases = draw_cases(config, Source(text, lm.tokenizer))
    results = Results(config.out / "results.json", {**provenance(config, "retrieval"), "methods": methods})
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        todo = [method for method in methods if results.row(method) is None]
        bar = progress.add_task("", total=len(cases) * len(todo), visible=bool(todo))
        for method in todo:
            progress.update(bar, description=method)
            with forgetting():
                row = ask(lm, method, config, cases, functools.partial(progress.advance, bar))
            results.add(row)
    results.rows.sort(key=lambda row: methods.index(row["method"]) if row["method"] in methods else len(methods))
    results.write()
    retrieval_report.write(config.out)
    retrieval_report.print_table(console, config.out)


def check(config: Config, layout: kvc.Layout, methods: Sequence[str]) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    for name in ("depths", "cases", "batch"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    if not config.lengths or min(config.lengths) < 1:
        raise ValueError(f"lengths={config.lengths} must name at least one length, in tokens.")
    if layout.max_positions is not None and max(config.lengths) >= layout.max_positions:
        raise ValueError(f"lengths={config.lengths} exceed the model's {layout.max_positions} positions.")
    if config.cache_dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"cache_dtype={config.cache_dtype!r} must be float32, bfloat16 or float16.")
    for method, length in itertools.product(methods, config.lengths):
        kvc.parse(method).plan(layout, max_len=length + 64, prompt_len=length)


def draw_cases(config: Config, source: Source) -> list[Case]:
    """All cases, by length and task; what may be read together stands together."""
    tasks = list(dict.fromkeys(filter(None, (part.strip() for part in config.tasks.split(";")))))
    if not tasks:
        raise ValueError(f"--tasks {config.tasks!r} names no task; there are {', '.join(TASKS)}.")
    options = {"cases": config.cases, "depths": config.depths, "whole": config.query_aware, "seed": config.seed}
    return [
        case for length in dict.fromkeys(config.lengths) for case in make_cases(source, tasks, length=length, **options)
    ]


def ask(
    lm: models.LanguageModel, method: str, config: Config, cases: Sequence[Case], advance: Callable[[], None]
) -> dict[str, Any]:
    """Ask a method all cases: its row of results."""
    asked, held, start = [], {}, time.perf_counter()
    room = max(case.max_new_tokens for case in cases)
    longest = -(-max(len(case.question) for case in cases) // 16) * 16  # one shape for all questions
    for (length, _), group in itertools.groupby(cases, lambda case: (case.length, case.task)):
        max_len = min(length + longest + room, lm.config.max_positions)
        plan = kvc.parse(method).plan(lm.layout, max_len=max_len, prompt_len=length)
        todo = list(group)
        for first in range(0, len(todo), config.batch):
            batch = todo[first : first + config.batch]
            texts, cache = answer(lm, plan, config, batch, longest, room)
            held[length] = cache
            for case, text in zip(batch, texts, strict=True):
                asked.append(
                    {"task": case.task, "length": length, "depth": case.depth, "score": case.score(text), "text": text}
                )
                advance()
    return {
        "method": method,
        "seconds": time.perf_counter() - start,
        "bytes_used": {str(length): cache.used // config.batch for length, cache in held.items()},
        "cases": asked,
    }


def answer(
    lm: models.LanguageModel, plan: kvc.CachePlan, config: Config, batch: Sequence[Case], longest: int, room: int
) -> tuple[list[str], kvc.Bytes]:
    """Texts generated for cases of one length, greedily, and the bytes of their compressed contexts.

    A batch that is not full is filled up, so that it needs no program of its own.
    """
    full = [*batch, *[batch[-1]] * (config.batch - len(batch))]
    prompts = [case.context + case.question if config.query_aware else case.context for case in full]
    dtype = jnp.dtype(config.cache_dtype) if config.cache_dtype else lm.dtype
    empty = plan.init(batch=len(full), dtype=dtype, prompt_lens=[len(prompt) for prompt in prompts])
    logits, caches, _, _ = prefill(lm, prompts, empty)
    held = kvc.nbytes(caches)
    if not config.query_aware:
        questions = np.zeros((len(full), longest), np.int32)
        for row, case in zip(questions, full, strict=True):
            row[: len(case.question)] = case.question
        lengths = jnp.asarray([len(case.question) for case in full], jnp.int32)
        args = (lm.params, jnp.asarray(questions), lengths, caches)
        logits, caches = compiled(_ask, (lm.model,), *args)[0](*args)
    settings = (lm.model, plan.block_size, Sampling(), lm.config.eos_ids)
    state = decode_loop.start(caches, logits, room)
    program, _ = compiled(decode_loop.run, (settings,), lm.params, state, jnp.int32(0))
    tokens = np.asarray(program(lm.params, state, jnp.int32(max(case.max_new_tokens for case in batch))).tokens)
    return [
        _decode(lm, [int(t) for t in row[: case.max_new_tokens] if t >= 0])
        for row, case in zip(tokens, batch, strict=False)
    ], held


def _decode(lm: models.LanguageModel, ids: list[int]) -> str:
    return "" if lm.tokenizer is None else lm.tokenizer.decode(ids)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _ask(
    model: Transformer, params: Any, tokens: jax.Array, length: jax.Array, caches: tuple[Any, ...]
) -> tuple[jax.Array, Any]:
    """Read questions i32[B, T] as a second turn: logits of the next token, and caches that hold the questions too."""
    heads, room = model.config.num_heads, tokens.shape[1]
    turns = tuple(kvc.open_prompt(cache, room, fresh=False, final=True, num_heads=heads) for cache in caches)
    return model.apply(params, tokens, turns, length, logits="last")


if __name__ == "__main__":
    sys.exit(run(Config, main))
