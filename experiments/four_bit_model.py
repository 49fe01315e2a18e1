"""What rotations make of a model in 4 bits: weights, activations and cache, one switch after the other.

Rotates the model's weights, rounds them with and without GPTQ on the first half of a text, and scores windows of the
second half: perplexity, KL from the model as it was loaded, bytes of weights and cache. Writes results.json,
four_bit_model.png and index.html; an interrupted run goes on where it stopped.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvcomp_jax as kvc
import models
from experiments import four_bit_report
from experiments.cli import provenance, run
from experiments.protocol import cut_windows, judge, score_chunk
from experiments.results import Results
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
    out: Path = Path("runs/four_bit_model")
    """Folder for the results."""


def main(config: Config) -> None:
    """Make the models one at a time, score each and write the report."""
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
    results = Results(config.out / "results.json", provenance(config, "four_bit_model"))
    todo = [variant for variant in variants(config, lm, texts, console) if results.row(variant.name) is None]
    if todo:
        with console.status("scoring the model as it was loaded"):
            reference = score(lm, EXACT, windows, config.context)
    for variant in todo:
        made, scored = variant.make(), reference
        if made is not lm or variant.cache != EXACT:
            with console.status(f"scoring {variant.name}"):
                scored = score(made, variant.cache, windows, config.context)
        row = compare(variant, made, scored, reference[0], windows, config.context)
        results.add(row)
        console.print(f"{variant.name}: perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f}")
    four_bit_report.write(config.out)
    four_bit_report.print_table(console, config.out)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model and a cache; `make` gives the model."""

    model: str
    cache: str
    make: Callable[[], models.LanguageModel]

    @property
    def name(self) -> str:
        """Of both."""
        return f"{self.model}, {self.cache}"


def variants(config: Config, lm: models.LanguageModel, texts: np.ndarray, console: Console) -> list[Variant]:
    """What is scored, the model as loaded first; models are made when they are asked for, and the last is kept."""
    activations = models.IntegerFormat(activation_bits=config.bits, down_activation_bits=config.down_bits)
    weights = models.IntegerFormat(weight_bits=config.bits)
    both = dataclasses.replace(activations, weight_bits=config.bits)
    w, a = f"W{config.bits}", f"A{config.bits}"

    @functools.lru_cache(maxsize=1)
    def rotated() -> models.LanguageModel:
        with console.status("rotating"):
            return models.rotate(lm, seed=config.seed)

    @functools.lru_cache(maxsize=1)
    def packed(kind: str) -> models.LanguageModel:
        return _packed(rotated(), weights, texts if kind else None, console)

    def with_activations(kind: str) -> models.LanguageModel:
        return dataclasses.replace(packed(kind), config=dataclasses.replace(packed(kind).config, integers=both))

    return [
        Variant("as loaded", EXACT, lambda: lm),
        Variant("as loaded", PLAIN_KV, lambda: lm),
        Variant(f"{w}{a}", PLAIN_KV, lambda: models.to_integers(lm, both)),
        Variant("rotated", EXACT, rotated),
        Variant("rotated", ROTATED_KV, rotated),
        Variant(f"rotated {a}", EXACT, lambda: models.to_integers(rotated(), activations)),
        *(
            variant
            for kind in ("", " GPTQ")
            for variant in (
                Variant(f"rotated {w}{kind}", EXACT, functools.partial(packed, kind)),
                Variant(f"rotated {w}{a}{kind}", ROTATED_KV, functools.partial(with_activations, kind)),
            )
        ),
    ]


def compare(
    variant: Variant,
    made: models.LanguageModel,
    scored: tuple[list[jax.Array], kvc.Bytes],
    reference: list[jax.Array],
    windows: np.ndarray,
    context: int,
) -> dict[str, Any]:
    """A variant's row of results; `scored` is what `score` made of it, `reference` the logits as loaded."""
    logits, held = scored
    judged = [judge(r, x, w[context + 1 :]) for r, x, w in zip(reference, logits, windows, strict=True)]
    layout = made.config.layout
    values = 2 * context * layout.num_layers * layout.num_kv_heads * layout.head_dim
    return {
        "method": variant.name,
        "model": variant.model,
        "cache": variant.cache,
        "perplexity": float(np.exp(np.mean([s.nll for s in judged]))),
        "kl": float(np.mean([s.kl for s in judged])),
        "largest_change": max(float(jnp.abs(r - x).max()) for r, x in zip(reference, logits, strict=True)),
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(made.params)),
        "bits_per_value": 8 * held.used / values,
    }


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
