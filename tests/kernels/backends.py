"""Cases on backends: plain JAX always, the others as slow tests."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import pytest

from pallas_kernels.dispatch import BACKENDS, Unsupported
from pallas_kernels.formats import Format


def backends(operation: str) -> list:
    """Parameters for every backend that the operation has, the reference aside."""
    found = [
        name
        for name in BACKENDS
        if name != "reference" and importlib.util.find_spec(f"pallas_kernels.{operation}.{name}") is not None
    ]
    slow = ("cpu", "tpu", "hopper", "gpu")  # compiled by Numba, seconds each, or in their interpreters
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in found]


def results(function: Callable, case: Any, backend: str) -> tuple[Any, Any]:
    """What a backend and the reference make of a case, both jitted; a call that the backend refuses is skipped."""
    try:
        got = _run(function, case, backend)
    except Unsupported as reason:
        pytest.skip(str(reason))
    return got, _reference(function, case)


@functools.lru_cache(maxsize=64)  # one result serves all backends
def _reference(function: Callable, case: Any) -> Any:
    return _run(function, case, "reference")


def _run(function: Callable, case: Any, backend: str) -> Any:
    args, options = case.arguments()
    call = functools.partial(function, **options, implementation=backend, interpret=True)
    return jax.jit(call, static_argnums=[i for i, x in enumerate(args) if isinstance(x, Format)])(*args)
