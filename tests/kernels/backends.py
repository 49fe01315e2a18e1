"""Which backends of an operation the cases run on: plain ones always, kernels in their interpreters as slow tests."""

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
    interpreted = ("tpu", "hopper", "gpu")
    return [pytest.param(name, marks=pytest.mark.slow) if name in interpreted else name for name in found]
