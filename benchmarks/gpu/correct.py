"""Every case of every operation, compiled on the device, against the reference computed on the CPU."""

import importlib
import importlib.util
import pkgutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks.record import Record
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.hadamard.ties import codes_apart, same_rows

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative to the largest output; a Hopper kernel computes in bfloat16

_FIRST = ("quantized_decode", "quantize_pack", "prefill")  # what is timed, and all that has a Hopper kernel
_LAST = ("codebook_decode", "homomorphic_decode")  # the slowest to lower

_lowering = threading.Lock()  # Triton's front end keeps state in its modules


def operations() -> list[str]:
    """Operations that have cases, those first that must be reached."""
    names = (module.name for module in pkgutil.iter_modules(pallas_kernels.__path__) if module.ispkg)
    others = [name for name in names if _exists(name, "cases") and name not in (*_FIRST, *_LAST)]
    return [*_FIRST, *others, *_LAST]


def check(record: Record, backends: tuple[str, ...], limit: int | None, workers: int, share: float) -> bool:
    """Run cases, at most `limit` an operation; whether every one that ran was right.

    Args:
      record: Where outcomes go.
      backends: Which to run, where an operation has them; what they cannot take is noted and no error.
      limit: Cases of an operation; None for all.
      workers: Threads; nearly all the time is compilation.
      share: Of the time left that this may take; cases that start no more are noted as not reached.
    """
    right, stop_at = True, record.left() * (1 - share)
    calls = []
    for operation in operations():
        having = [backend for backend in backends if _exists(operation, backend)]
        cases = importlib.import_module(f"pallas_kernels.{operation}.cases").CASES if having else {}
        calls += [(operation, name, case, having) for name, case in list(cases.items())[:limit]]

    def run(operation, name, case, having):
        if record.left() < stop_at:
            return [{"outcome": "not reached"}] * len(having)
        return _outcomes(operation, case, having)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, *call) for call in calls]
        for (operation, name, _, having), future in zip(calls, futures, strict=True):
            for backend, row in zip(having, future.result(), strict=True):
                right = right and row["outcome"] not in ("wrong", "failed")
                record.add("correctness", operation=operation, case=name, backend=backend, **row)
    return right


def _exists(operation: str, module: str) -> bool:
    return importlib.util.find_spec(f"pallas_kernels.{operation}.{module}") is not None


def _outcomes(operation: str, case, backends: Sequence[str]) -> list[dict]:
    """What each backend makes of a case, held to one result of the reference."""
    function = getattr(importlib.import_module(f"pallas_kernels.{operation}"), getattr(case, "function", operation))
    with jax.default_device(jax.devices("cpu")[0]):
        args, options = case.arguments()
        want = function(*args, **options, implementation="reference")
    return [_outcome(operation, case, partial(function, **options), args, want, backend) for backend in backends]


def _outcome(operation: str, case, function: Callable, args: tuple, want, backend: str) -> dict:
    leaves, tree = jax.tree.flatten(args)
    static = [x if not isinstance(x, jax.Array) else None for x in leaves]

    def run(arrays):
        full = [x if still is None else still for x, still in zip(arrays, static, strict=True)]
        return function(*jax.tree.unflatten(tree, full), implementation=backend)

    on_device = [jax.device_put(x, jax.devices()[0]) if isinstance(x, jax.Array) else None for x in leaves]
    try:
        with _lowering:
            lowered = jax.jit(run).lower(on_device)
        got = jax.block_until_ready(lowered.compile()(on_device))
    except Unsupported as reason:
        return {"outcome": "unsupported", "reason": str(reason)}
    except Exception as error:  # a kernel that does not compile must not hide the others
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
    return judged(operation, case, backend, got, want)


def judged(operation: str, case, backend: str, got, want) -> dict:
    """Whether what a backend made of a case is right, and by how much it differs from the reference."""
    if getattr(case, "function", operation) == "rotate_quantize_pack":  # words, whose difference means nothing
        with jax.default_device(jax.devices("cpu")[0]):
            got, want = (jax.tree.map(jnp.asarray, jax.device_get(rows)) for rows in (got, want))
            most, share = codes_apart(got, want, case.fmt)
            right = same_rows(got, want, case.fmt)
        return {"outcome": "right" if right else "wrong", "most_codes_apart": most, "share_apart": share}
    error = max(jax.tree.leaves(jax.tree.map(_error, _comparable(got), _comparable(want))), default=0.0)
    limit = 0.0 if operation == "quantize_pack" else TOLERANCE["float32"]  # the former is exact, bit for bit
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
