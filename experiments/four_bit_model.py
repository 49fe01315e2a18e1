"""What rotations make of a model in 4 bits: weights, activations and cache, one switch after the other.

Rotates the model's weights, rounds them with and without GPTQ on the first half of a text, and scores windows of the
second half. Perplexity, KL from the model as it was loaded, bytes of weights and cache.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kvcomp_jax as kvc
import models
from experiments.cli import run
from experiments.protocol import cut_windows, judge, score_chunk
from experiments.texts import load_text
from models.generate import prefill
from models.programs import compiled

EXACT, ROTATED_KV, PLAIN_KV = "full", "quarot:rotate_v=false", "int4"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to try."""

    text: Path
    """A text file, or the King James Bible as kjv.jsonl."""
    model: str = "smollm2"
    """What `models.load` takes."""
    bits: int = 4
    """Of weights and activations; the cache has 4."""
    down_bits: int | None = None
    """Of activations before the last map of each MLP, e.g. 8; None as `bits`."""
    context: int = 512
    """Tokens prefilled and compressed."""
    score: int = 256
    """Tokens after them."""
    windows: int = 3
    """Evenly spaced places in the second half of the text."""
    calibration: int = 16
    """Sequences of the first half that GPTQ sees; the paper has 128."""
    calibration_tokens: int = 512
    """Of each; the paper has 2048."""
    seed: int = 0
    """Of the signs of the rotation."""


def main(config: Config) -> None:
    """Make the models one at a time, score each and print the table."""
    console = Console()
    with console.status(f"loading {config.model}"):
        lm = models.load(config.model)
    if lm.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; a text needs one.")
    tokens = lm.tokenizer.encode(load_text(config.text))
    first, second = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    windows = cut_windows(second, context=config.context, score=config.score, windows=config.windows)
    size = config.calibration_tokens
    texts = cut_windows(first, context=size - 2, score=2, windows=config.calibration)
    table = Table("model", "cache", "perplexity", "KL", "largest change", "weights MB", "bits/value")
    reference: list[jax.Array] = []
    for name, made, method in variants(config, lm, texts, console):
        with console.status(f"scoring {name}, {method}"):
            logits, held = score(made, method, windows, config.context)
        reference = reference or logits
        judged = [judge(r, x, w[config.context + 1 :]) for r, x, w in zip(reference, logits, windows, strict=True)]
        perplexity, kl = np.exp(np.mean([s.nll for s in judged])), np.mean([s.kl for s in judged])
        change = max(float(jnp.abs(r - x).max()) for r, x in zip(reference, logits, strict=True))
        layout = made.config.layout
        values = 2 * config.context * layout.num_layers * layout.num_kv_heads * layout.head_dim
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(made.params)) / 1e6
        figures = f"{perplexity:.3f}", f"{kl:.4f}", f"{change:.1e}", f"{weights:.1f}", f"{8 * held.used / values:.2f}"
        table.add_row(name, method, *figures)
        console.print(f"{name}, {method}: perplexity {figures[0]}, KL {figures[1]}")
    console.print(table)


def variants(
    config: Config, lm: models.LanguageModel, texts: np.ndarray, console: Console
) -> Iterator[tuple[str, models.LanguageModel, str]]:
    """Names, models and methods, the model as loaded first."""
    activations = models.IntegerFormat(activation_bits=config.bits, down_activation_bits=config.down_bits)
    weights = models.IntegerFormat(weight_bits=config.bits)
    both = dataclasses.replace(activations, weight_bits=config.bits)
    w, a = f"W{config.bits}", f"A{config.bits}"
    yield "as loaded", lm, EXACT
    yield "as loaded", lm, PLAIN_KV
    yield f"{w}{a}", models.to_integers(lm, both), PLAIN_KV
    with console.status("rotating"):
        rotated = models.rotate(lm, seed=config.seed)
    yield "rotated", rotated, EXACT
    yield "rotated", rotated, ROTATED_KV
    yield f"rotated {a}", models.to_integers(rotated, activations), EXACT
    for kind, calibration in (("", None), (" GPTQ", texts)):
        packed = _packed(rotated, weights, calibration, console)
        yield f"rotated {w}{kind}", packed, EXACT
        config_of_both = dataclasses.replace(packed.config, integers=both)
        yield f"rotated {w}{a}{kind}", dataclasses.replace(packed, config=config_of_both), ROTATED_KV


def _packed(
    lm: models.LanguageModel, integers: models.IntegerFormat, texts: np.ndarray | None, console: Console
) -> models.LanguageModel:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("layers rounded", total=lm.config.num_layers)
        return models.to_integers(lm, integers, calibration=texts, advance=lambda: progress.advance(bar))


def score(
    lm: models.LanguageModel, method: str, windows: np.ndarray, context: int
) -> tuple[list[jax.Array], kvc.Bytes]:
    """Logits of each window's tokens after the context, whose cache is compressed, and the bytes of that cache."""
    plan = kvc.parse(method).plan(lm.config.layout, max_len=windows.shape[1], prompt_len=context)
    logits: list[jax.Array] = []
    held = kvc.Bytes(0, 0, 0)
    for window in windows:
        empty = plan.init(batch=1, dtype=lm.dtype, prompt_lens=[context])
        _, caches, _, _ = prefill(lm, [window[:context].tolist()], empty)
        rest = jnp.asarray(window[context:])
        logits.append(compiled(score_chunk, (lm.model,), lm.params, rest, caches)[0](lm.params, rest, caches))
        held = kvc.nbytes(caches)
    return logits, held


if __name__ == "__main__":
    sys.exit(run(Config, main))
