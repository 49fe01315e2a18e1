"""Every case of every operation, compiled on the device, against the reference computed on the CPU."""

import importlib
import importlib.util
import pkgutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np

import pallas_kernels
from benchmarks.record import Record
from pallas_kernels.dispatch import Unsupported

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative to the largest output; a Hopper kernel computes in bfloat16

_lowering = threading.Lock()  # Triton's front end keeps state in its modules


def operations() -> list[str]:
    """Operations that have cases."""
    names = (module.name for module in pkgutil.iter_modules(pallas_kernels.__path__) if module.ispkg)
    return [name for name in names if importlib.util.find_spec(f"pallas_kernels.{name}.cases")]


def check(record: Record, backends: tuple[str, ...], limit: int | None, workers: int, share: float) -> bool:
    """Run cases, at most `limit` an operation; whether every one that ran was right.

    Args:
      record: Where outcomes go.
      backends: Which to run; what they cannot take is noted and no error.
      limit: Cases of an operation; None for all.
      workers: Threads; nearly all the time is compilation.
      share: Of the time left that this may take; cases that start no more are noted as not reached.
    """
    right, stop_at = True, record.left() * (1 - share)
    calls = []
    for operation in operations():
        cases = importlib.import_module(f"pallas_kernels.{operation}.cases").CASES
        calls += [(operation, name, case, b) for name, case in list(cases.items())[:limit] for b in backends]

    def run(operation, name, case, backend):
        if record.left() < stop_at:
            return {"outcome": "not reached"}
        return _outcome(operation, case, backend)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, *call) for call in calls]
        for (operation, name, _, backend), future in zip(calls, futures, strict=True):
            row = future.result()
            right = right and row["outcome"] not in ("wrong", "failed")
            record.add("correctness", operation=operation, case=name, backend=backend, **row)
    return right


def _outcome(operation: str, case, backend: str) -> dict:
    function = getattr(importlib.import_module(f"pallas_kernels.{operation}"), getattr(case, "function", operation))
    with jax.default_device(jax.devices("cpu")[0]):
        args, options = case.arguments()
        want = function(*args, **options, implementation="reference")
    leaves, tree = jax.tree.flatten(args)
    static = [x if not isinstance(x, jax.Array) else None for x in leaves]

    def run(arrays):
        full = [x if still is None else still for x, still in zip(arrays, static, strict=True)]
        return partial(function, **options, implementation=backend)(*jax.tree.unflatten(tree, full))

    on_device = [jax.device_put(x, jax.devices()[0]) if isinstance(x, jax.Array) else None for x in leaves]
    try:
        with _lowering:
            lowered = jax.jit(run).lower(on_device)
        got = jax.block_until_ready(lowered.compile()(on_device))
    except Unsupported as reason:
        return {"outcome": "unsupported", "reason": str(reason)}
    except Exception as error:  # a kernel that does not compile must not hide the others
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
    error = max(jax.tree.leaves(jax.tree.map(_error, _comparable(got), _comparable(want))), default=0.0)
    limit = 0.0 if operation == "quantize_pack" else TOLERANCE["float32"]
    if limit and (backend == "hopper" or getattr(case, "dtype", "") == "bfloat16"):
        limit = TOLERANCE["bfloat16"]
    return {"outcome": "right" if error <= limit else "wrong", "error": error, "tolerance": limit}


def _comparable(out):
    """Attention states normalised, since their maxima are a backend's own choice; anything else as it is."""
    if type(out) is tuple and len(out) == 3 and out[0].ndim == out[1].ndim + 1:
        acc, top, total = (np.asarray(x, np.float32) for x in out)
        seen = total > 0
        total = np.where(seen, total, 1.0)
        return acc / total[..., None], np.where(seen, top + np.log(total), 0.0), seen
    return out


def _error(got, want) -> float:
    """Largest difference relative to the largest value; infinite where one is not finite or shapes differ."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if np.array_equal(got, want):
        return 0.0
    got, want = got.astype(np.float64), want.astype(np.float64)
    difference = np.abs(got - want).max() / max(np.abs(want).max(), 1e-6)
    return float(difference) if np.isfinite(difference) else float("inf")
