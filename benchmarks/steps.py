"""Decode steps of a model over a filled cache, by method, interleaved."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import kvcomp_jax as kvc
import models
from benchmarks.record import Record
from benchmarks.timing import interleaved
from models.decode_loop import Stepper

_STEPS = 16  # of one sample


def measure_steps(record: Record, lm: models.LanguageModel, methods: Sequence[str], context: int, rounds: int) -> None:
    """Time the generation loop over caches of `context` random tokens."""
    programs, facts = {}, {}
    for method in methods:
        plan = kvc.parse(method).plan(lm.layout, max_len=context + _STEPS, prompt_len=context)
        caches = jax.block_until_ready(_filled(plan, context))
        stepper = Stepper(lm, plan, _STEPS)
        programs[method] = _sample(stepper, caches)
        rungs = kvc.kernels_in_use(caches[0], num_heads=lm.config.num_heads)
        kernels = [f"{rung.operation} / {rung.backend}" for rung in rungs]
        facts[method] = {"kernels": kernels, "cache_bytes": kvc.nbytes(caches).allocated}
    times = interleaved(programs, max(3, rounds // 3), record.left)
    for method, row in times.items():
        ratio = times[methods[0]]["median_s"] / row["median_s"]
        record.add("decode_steps", method=method, context=context, **facts[method], **row,
                   **{f"times_faster_than_{methods[0]}": ratio})  # fmt: skip


def _filled(plan: kvc.CachePlan, context: int) -> tuple[Any, ...]:
    @jax.jit
    def fill(cache: Any, key: jax.Array) -> Any:
        shape = (1, context, plan.layout.num_kv_heads, plan.layout.head_dim)
        q, k, v = (jax.random.normal(jax.random.fold_in(key, i), shape) for i in range(3))
        return kvc.prefill(cache, q, k, v)[1]

    empty = plan.init(batch=1, dtype=jnp.float32)
    return tuple(fill(cache, jax.random.key(i)) for i, cache in enumerate(empty))


def _sample(stepper: Stepper, caches: tuple[Any, ...]) -> Any:
    def run() -> float:
        state = stepper.start(jax.tree.map(jnp.copy, caches))  # the loop takes its caches over
        start = time.perf_counter()
        stepper.run(state)
        return (time.perf_counter() - start) / stepper.num_steps

    return run
