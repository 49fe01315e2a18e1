"""Decode steps of a model over filled caches, by method, interleaved.

Caches are filled with random tokens as a prompt fills them, but nobody attends to these unless the policy wants to see
it: what a step costs does not depend on them. The time of a step is that of the whole decode loop, the settling of
blocks included.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

import kvcomp_jax as kvc
from benchmarks.record import Record
from benchmarks.timing import interleaved
from kvcomp_jax.cache import Exact
from kvcomp_jax.fill import fill
from models import LanguageModel
from models.decode_loop import run, start
from models.sampling import Sampling

_STEPS = 16  # of one sample

_lowering = threading.Lock()  # Triton's front end keeps state in its modules


def measure_steps(
    record: Record,
    lm: LanguageModel,
    methods: Sequence[str],
    *,
    model: str,
    batch: int,
    context: int,
    rounds: int,
    workers: int = 1,
) -> None:
    """Time the generation loop from caches of `context` tokens a row on; the first method is what others are held to.

    Args:
      record: Gets a row a method.
      lm: With parameters; caches are in their dtype.
      model: What to call it.
      batch, context: Rows, and tokens of each before the first step.
      rounds: Three times the samples of `_STEPS` steps each.
      workers: Programs compiled at a time.
    """
    rounds = max(3, rounds // 3)
    most = _STEPS * (rounds + 1)  # one sample is the warm-up
    plans = {method: kvc.parse(method).plan(lm.config.layout, max_len=context + most, prompt_len=context)
             for method in methods}  # fmt: skip
    with ThreadPoolExecutor(workers) as pool:
        compiling = {method: pool.submit(_compiled, lm, plan, batch, most) for method, plan in plans.items()}
    programs, facts = {}, {}
    for method, plan in plans.items():
        try:
            programs[method], facts[method] = _prepared(lm, plan, compiling[method].result(), batch, context, most)
        except Exception as error:  # one that does not fit or compile must not hide the others
            reason = f"{type(error).__name__}: {error}"[:300]
            record.add("decode_steps", model=model, method=method, batch=batch, context=context, failed=reason)
    times = interleaved(programs, rounds, record.left)
    weights = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    for method, row in times.items():
        ratio = {}
        if methods[0] in times:
            ratio = {f"times_faster_than_{methods[0]}": times[methods[0]]["median_s"] / row["median_s"]}
        record.add("decode_steps", model=model, num_layers=lm.config.num_layers, method=method, batch=batch,
                   context=context, weight_bytes=weights, **facts[method], **row,
                   tokens_per_s=batch / row["median_s"], **ratio)  # fmt: skip


def _compiled(lm: LanguageModel, plan: kvc.CachePlan, batch: int, most: int) -> Callable:
    """The decode loop over caches of a plan, compiled from their shapes."""
    caches = jax.eval_shape(lambda: plan.init(batch=batch, dtype=lm.dtype))
    state = jax.eval_shape(functools.partial(_start, lm, most=most), caches)
    with _lowering:
        lowered = run.lower((lm.model, plan.block_size, Sampling(), ()), lm.params, state, jnp.int32(0))
    return lowered.compile()


def _prepared(
    lm: LanguageModel, plan: kvc.CachePlan, program: Callable, batch: int, context: int, most: int
) -> tuple[Callable[[], float], dict[str, Any]]:
    """What takes a sample, and what its caches are."""
    caches = jax.block_until_ready(_filled(plan, batch, context, lm.dtype))
    rungs = kvc.kernels_in_use(caches[0], num_heads=lm.config.num_heads)
    kernels = [f"{rung.operation} / {rung.backend}" for rung in rungs]
    facts = {"kernels": kernels, "cache_bytes": kvc.nbytes(caches).allocated}
    return _sampler(program, lm, caches, most), facts


def _start(lm: LanguageModel, caches: Any, most: int) -> Any:
    return start(caches, jnp.zeros((caches[0].length.shape[0], lm.config.vocab_size)), most)


def _filled(plan: kvc.CachePlan, batch: int, context: int, dtype: Any) -> tuple[Any, ...]:
    """Caches that hold `context` tokens a row."""

    @functools.partial(jax.jit, donate_argnums=0)
    def filled(cache: Any, key: jax.Array) -> Any:
        shape = (batch, context, plan.layout.num_kv_heads, plan.layout.head_dim)
        k, v, q = (jax.random.normal(jax.random.fold_in(key, i), shape, dtype) for i in range(3))
        if cache.spec.policy.looks_at_prompt:
            return kvc.prefill(cache, q, k, v)[1]
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return fill(cache, Exact(k=k, v=v, stat=None), jnp.full(batch, context, jnp.int32))

    return tuple(filled(cache, jax.random.key(i)) for i, cache in enumerate(plan.init(batch=batch, dtype=dtype)))


def _sampler(program: Callable, lm: LanguageModel, caches: Any, most: int) -> Callable[[], float]:
    """Seconds a step of the next `_STEPS` steps; text grows, so that no cache is copied."""
    state, done = jax.block_until_ready(_start(lm, caches, most)), 0

    def sample() -> float:
        nonlocal state, done
        done += _STEPS
        begin = time.perf_counter()
        state = jax.block_until_ready(program(lm.params, state, jnp.int32(done)))
        return (time.perf_counter() - begin) / _STEPS

    return sample
