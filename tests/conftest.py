"""Strict JAX, several CPU devices, few and deterministic hypothesis examples.

Rank promotion raises. Dtype promotion stays standard: caches hold bfloat16 or float16 beside float32 accumulators, and
Flax's own layers mix them. Warnings are errors, see pyproject.toml.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("few", max_examples=5, deadline=None, derandomize=True, database=None)
settings.load_profile("few")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Drop compiled programs after each module: otherwise a worker gathers gigabytes of them."""
    yield
    jax.clear_caches()
