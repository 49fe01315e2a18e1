"""Strict JAX, several CPU devices, few and deterministic hypothesis examples.

Rank promotion raises. Dtype promotion stays standard: caches hold bfloat16 or float16 beside float32 accumulators, and
Flax's own layers mix them. Warnings are errors, see pyproject.toml.
"""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("few", max_examples=3, deadline=None, derandomize=True, database=None)
settings.load_profile("few")

_ROOM = 5 * 2**30  # bytes a worker may hold in compiled programs and arrays before it forgets them


@pytest.fixture(autouse=True)
def _bounded_memory():
    """Hundreds of small compilations would otherwise add up to many gigabytes."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _ROOM:
        jax.clear_caches()
