"""Feed a long stream through a compressed cache: perplexity and memory as it grows.

The stream is what the model wrote itself with the full cache (--source own), so that methods are judged on long
generation with eviction while decoding, or a text of any length (--source text). Writes results.json, stream.png and
index.html; an interrupted run goes on where it stopped.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvcomp_jax as kvc
import models
from experiments import streaming_report
from experiments.cli import provenance, run, split_methods
from experiments.protocol import feed
from experiments.results import Results, write_atomically
from experiments.texts import load_text
from models import decode_loop
from models.generate import prefill
from models.programs import compiled, forgetting
from models.sampling import Sampling

DEFAULT_METHODS = (
    "full;h2o:budget=1024;snapstream:budget=1024;streaming_llm:budget=1024;streaming_llm:budget=1024,positions=cache"
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to feed, and through what."""

    text: Path
    """A text file, or the King James Bible as kjv.jsonl: the prompt, and what follows it if source is text."""
    model: str = "smollm2"
    """What `models.load` takes."""
    methods: str = DEFAULT_METHODS
    """Methods, separated by semicolons."""
    source: Literal["own", "text"] = "own"
    """Whether the stream is the model's own continuation with the full cache, or goes on in the text."""
    prompt: int = 512
    """Tokens before the stream, read at once."""
    tokens: int = 4096
    """Of the stream."""
    chunk: int = 1
    """Tokens a call. 1 decodes, as generation does; more are read together, each seeing the cache as it was before them
    and those of its chunk, which is faster."""
    every: int = 256
    """Tokens of one point of the curve."""
    temperature: float = 1.0
    """Of the continuation; 0 takes the most likely token."""
    seed: int = 0
    """Of the continuation."""
    out: Path = Path("runs/streaming")
    """Folder for the results."""
    cache_dtype: str | None = None
    """Of exact cached tokens: float32, bfloat16 or float16; None is the model's."""


def main(config: Config) -> None:
    """Feed every method and write the report."""
    console = Console()
    methods = split_methods(config.methods)
    check(config, models.load_layout(config.model), methods, console)
    text = load_text(config.text)
    with console.status(f"loading {config.model}"):
        lm = models.load(config.model)
    if lm.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; a text needs one.")
    results = Results(config.out / "results.json", {**provenance(config, "streaming"), "methods": methods})
    todo = [method for method in methods if results.row(method) is None]
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=config.tokens * len(todo), visible=bool(todo))
        if todo:
            stream = _stream(lm, config, lm.tokenizer.encode(text), console)
        for method in todo:
            progress.update(bar, description=method)
            with forgetting():
                row = follow(lm, method, config, stream, functools.partial(progress.advance, bar))
            results.add(row)
    results.rows.sort(key=lambda row: methods.index(row["method"]) if row["method"] in methods else len(methods))
    results.write()
    streaming_report.write(config.out)
    streaming_report.print_table(console, config.out)


def check(config: Config, layout: kvc.Layout, methods: list[str], console: Console) -> None:
    """Raise ValueError for settings that cannot work; say so where a stream leaves the model's positions."""
    for name in ("prompt", "tokens", "chunk", "every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    for name, part in (("tokens", "every"), ("every", "chunk")):
        if getattr(config, name) % getattr(config, part):
            raise ValueError(
                f"{name}={getattr(config, name)} must be a multiple of {part}={getattr(config, part)} tokens."
            )
    if config.cache_dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"cache_dtype={config.cache_dtype!r} must be float32, bfloat16 or float16.")
    size = config.prompt + config.tokens
    if layout.max_positions is not None and size > layout.max_positions:
        beyond = f"prompt={config.prompt} + tokens={config.tokens} exceed the model's {layout.max_positions} positions"
        if config.source == "own":
            raise ValueError(f"{beyond}; the full cache cannot write so much: take --source text.")
        console.print(f"Note: {beyond}. Only positions counted in the cache stay among them.")
    for method in methods:
        kvc.parse(method).plan(layout, max_len=size, prompt_len=config.prompt)


def _stream(lm: models.LanguageModel, config: Config, text: list[int], console: Console) -> list[int]:
    """Prompt and stream; a continuation is kept in a file, so that a run that goes on feeds the same."""
    needed = config.prompt + (config.tokens if config.source == "text" else 0)
    if len(text) < needed:
        raise ValueError(f"the text has {len(text)} tokens, {needed} are needed; take a longer text.")
    if config.source == "text":
        return text[:needed]
    file = config.out / "continuation.json"
    if not file.exists():
        with console.status("writing the continuation"):
            write_atomically(file, json.dumps(text[:needed] + continuation(lm, text[:needed], config)))
    return json.loads(file.read_text(encoding="utf-8"))


def continuation(lm: models.LanguageModel, prompt: list[int], config: Config) -> list[int]:
    """What the model writes after a prompt with the full cache; nothing ends it early."""
    plan = kvc.parse("full").plan(lm.layout, max_len=len(prompt) + config.tokens)
    logits, caches, _, _ = prefill(lm, [prompt], plan.init(batch=1, dtype=lm.dtype))
    settings = (lm.model, plan.block_size, Sampling(config.temperature), ())
    state = decode_loop.start(caches, logits, config.tokens, seed=config.seed)
    return np.asarray(decode_loop.run(settings, lm.params, state, jnp.int32(config.tokens)).tokens[0]).tolist()


def follow(
    lm: models.LanguageModel, method: str, config: Config, stream: list[int], advance: Callable[[int], None]
) -> dict[str, Any]:
    """Feed the stream after its prompt through a method's cache: its row of results.

    The first token of the stream is judged by the exact prompt's logits and left out; the last one is fed to no end.
    """
    size, prompt = config.prompt + config.tokens, stream[: config.prompt]
    plan = kvc.parse(method).plan(lm.layout, max_len=size, prompt_len=config.prompt)
    dtype = jnp.dtype(config.cache_dtype) if config.cache_dtype else lm.dtype
    empty = plan.init(batch=1, dtype=dtype, prompt_lens=[config.prompt])
    _, caches, _, _ = prefill(lm, [prompt], empty)
    fed, state = np.asarray([*stream, 0], np.int32), (caches, jnp.int32(0))
    curve, seconds, programs = [], 0.0, 0
    for start in range(config.prompt, size, config.every):
        shape = (config.every // config.chunk, config.chunk)
        tokens, targets = (jnp.asarray(fed[start + i : start + i + config.every].reshape(shape)) for i in (0, 1))
        args = (lm.params, tokens, targets, state)
        program, compile_s = compiled(feed, (lm.model, plan.block_size), *args)
        began = time.perf_counter()
        nll, state = jax.block_until_ready(program(*args))
        seconds, programs = seconds + time.perf_counter() - began, programs + bool(compile_s)
        held, real = kvc.nbytes(state[0]), min(config.every, size - 1 - start)
        curve.append(
            {
                "tokens": start + config.every,
                "nll": float(np.asarray(nll)[:real].mean()),
                "bytes_used": held.used,
                "bytes_allocated": held.allocated,
            }
        )
        advance(config.every)
    return {
        "method": method,
        "perplexity": float(np.exp(np.mean([point["nll"] for point in curve]))),
        "tokens_per_s": config.tokens / seconds,
        "programs": programs,
        "curve": curve,
    }


if __name__ == "__main__":
    sys.exit(run(Config, main))
