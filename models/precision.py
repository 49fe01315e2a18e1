"""The dtype that each platform computes fast in: decided here and nowhere else."""

from typing import Any

import jax
import jax.numpy as jnp


def default_dtype() -> Any:
    """float32 on CPU, bfloat16 on accelerators.

    XLA on CPU takes 230-440 ms in bfloat16 for the products of one decode step of a 135M-parameter model that take
    20 ms in float32.
    """
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
