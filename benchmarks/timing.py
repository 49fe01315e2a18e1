"""Interleaved timing: every program once a round, medians and spread over rounds."""

import math
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

CALL_S = 5e-3  # on a GPU, beside which the launch is about a hundredth


def interleaved(programs: Mapping[str, Callable[[], float]], rounds: int, left: Callable[[], float]) -> dict[str, dict]:
    """Median and quartiles in seconds of each program, each of which runs and returns how long it took.

    Rounds begin with another program each, so that none is always first.
    """
    samples: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    for run in programs.values():
        run()  # warm-up
    for i in range(rounds):
        if left() < 0:
            break
        turn = i % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            samples[name].append(programs[name]())
    return {name: _summary(values) for name, values in samples.items() if values}


def wall(compiled: Callable[..., object], *args: object) -> Callable[[], float]:
    """Seconds from call to finished result, with the tens of microseconds that Python and the launch take."""

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        return time.perf_counter() - start

    return run


def repeats(num_bytes: int, bytes_per_s: float, call_s: float) -> int:
    """How often work on `num_bytes` must be done for a call to last `call_s` where memory limits it; at least once."""
    return max(1, math.ceil(call_s * bytes_per_s / num_bytes))


def bandwidth(num_bytes: int, rounds: int, left: Callable[[], float]) -> dict[str, float]:
    """Bytes a second of a copy (read and written bytes counted) and of a read, over buffers of `num_bytes`."""
    x = jnp.ones(num_bytes // 4, jnp.float32)
    programs = {"copy": wall(jax.jit(lambda x: x + 1), x), "read": wall(jax.jit(jnp.max), x), "empty": wall(_empty())}
    times = interleaved(programs, rounds, left)
    launch = times["empty"]["median_s"]
    return {
        "copy_bytes_per_s": 2 * num_bytes / (times["copy"]["median_s"] - launch),
        "read_bytes_per_s": num_bytes / (times["read"]["median_s"] - launch),
        "launch_s": launch,
        "bytes": num_bytes,
    }


def _empty() -> Callable[[], object]:
    x = jnp.ones((), jnp.float32)
    f = jax.jit(lambda x: x + 1)
    return lambda: f(x)


def _summary(values: list[float]) -> dict:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median_s": float(middle), "quartiles_s": [float(low), float(high)], "rounds": len(values)}
