"""Which backends of an operation the cases run on: plain JAX always, the others as slow tests."""

import importlib.util

import pytest

from pallas_kernels.dispatch import BACKENDS


def backends(operation: str) -> list:
    """Parameters for every backend that the operation has, the reference aside."""
    found = [
        name
        for name in BACKENDS
        if name != "reference" and importlib.util.find_spec(f"pallas_kernels.{operation}.{name}") is not None
    ]
    slow = ("cpu", "tpu", "hopper", "gpu")  # compiled by Numba, seconds each, or in their interpreters
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in found]
