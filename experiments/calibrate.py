"""Calibrate a method for a model on a text: what its quantisers need to know, saved with where it comes from.

Reads the end of the text, `samples` * `seq_len` tokens. A comparison on the same text in w windows starts the last one
1/w of the text before its end, so that the two do not overlap as long as the text is long; where they do, its table
says so. Needs a gradient, and holds four float32 numbers for each cached one, and its queries: 2.6 GB for 16 * 2048
tokens of SmolLM2-135M.
"""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvcomp_jax as kvc
import models
from experiments.cli import environment, run
from experiments.texts import load_text, sha256
from kvcomp_jax.calibrate import About, Activations, file_name, save
from models.activations import activations


@dataclasses.dataclass(frozen=True)
class Config:
    """What to calibrate."""

    text: Path
    """A text file, or the King James Bible as kjv.jsonl; its end is read."""
    method: str = "kvquant"
    """A method that needs calibration, with its options."""
    model: str = "smollm2"
    """What `models.load` takes: a folder, a .gguf file, "smollm2"."""
    out: Path | None = None
    """The file to write; None is beside the model, where the method looks for it."""
    samples: int = 16
    """Sequences to read."""
    seq_len: int = 2048
    """Tokens of each."""


def main(config: Config) -> None:
    """Run the model over the samples, calibrate layer by layer, write the file."""
    console = Console()
    name, info, options = _method(config.method)
    for field in ("samples", "seq_len"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field}={getattr(config, field)} must be at least 1.")
    out = config.out or _beside(config.model, name, options)
    text = load_text(config.text)
    with console.status(f"loading {config.model}"):
        lm = models.load(config.model)
    if lm.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; a calibration on text needs one.")
    with console.status("reading the text"):
        tokens = lm.tokenizer.encode(text)
    samples = cut_samples(tokens, config.samples, config.seq_len)
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("gradients", total=len(samples))
        layers = collect(lm, samples, lambda: progress.advance(bar))
        bar = progress.add_task("calibrating", total=len(layers))
        parts = []
        while layers:  # each layer's activations are dropped once they are used
            parts.append(info.calibrate(layers.pop(0), **options))
            progress.advance(bar)
    tensors = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
    provenance = _provenance(config, text, len(tokens), samples)
    save(out, tensors, About(name, options, lm.layout.fingerprint or "", provenance))
    console.print(f"{out}\nuse it with --methods '{name}:calibration={out}'" if config.out else f"{out}")


def cut_samples(tokens: list[int], samples: int, seq_len: int) -> np.ndarray:
    """The last samples * seq_len tokens of a text, i32[samples, seq_len].

    Raises:
      ValueError: If the text is too short.
    """
    needed = samples * seq_len
    if len(tokens) < needed:
        raise ValueError(
            f"the text has {len(tokens)} tokens; samples={samples} of seq_len={seq_len} need {needed}: take a longer "
            "text or fewer samples."
        )
    return np.asarray(tokens[len(tokens) - needed :], np.int32).reshape(samples, seq_len)


def collect(lm: models.LanguageModel, samples: np.ndarray, advance: Any) -> list[Activations]:
    """Activations of each layer over all samples."""
    seen = []
    for sample in samples:
        seen.append(activations(lm, sample))
        advance()
    return [_joined(layer) for layer in zip(*seen, strict=True)]


def _joined(samples: Sequence[Activations]) -> Activations:
    """One layer's activations of several samples as those of one."""
    *arrays, ropes, weights = zip(*samples, strict=True)
    return Activations(*(np.concatenate(x) for x in arrays), rope=ropes[0], o_weight=weights[0])


def _method(text: str) -> tuple[str, Any, dict[str, Any]]:
    """Name and table row of a method, and those of its options that its calibration depends on."""
    parts = kvc.parse(text).parts
    name, given = parts[0]
    info = kvc.METHODS[name]
    if len(parts) > 1 or info.calibrate is None:
        those = ", ".join(n for n, m in kvc.METHODS.items() if m.calibration)
        raise ValueError(f"{text}: needs no calibration; methods that do: {those}.")
    return name, info, made_with(info, dict(given))


def made_with(info: kvc.MethodInfo, given: dict[str, Any]) -> dict[str, Any]:
    """Those of a method's options, default or given, that its calibration depends on."""
    values = {key: option.default for key, option in info.options.items()} | given
    wanted = inspect.signature(info.calibrate).parameters if info.calibrate else ()
    return {key: value for key, value in values.items() if key in wanted}


def _beside(model: str, name: str, options: dict[str, Any]) -> Path:
    folder = models.load_layout(model).calibrations
    return Path(folder or ".") / file_name(name, options)


def _provenance(config: Config, text: str, num_tokens: int, samples: np.ndarray) -> dict[str, Any]:
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "model": config.model,
        "text": str(config.text),
        "text_sha256": sha256(text),
        "text_tokens": num_tokens,
        "tokens_read": [num_tokens - samples.size, num_tokens],
        "samples": config.samples,
        "seq_len": config.seq_len,
    }


if __name__ == "__main__":
    sys.exit(run(Config, main))
