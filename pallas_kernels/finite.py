"""Values without a code."""

import jax
import jax.numpy as jnp
from jax.experimental import checkify


def check_finite(x: jax.Array, name: str) -> None:
    """Make values of x that are not finite an error under `checkify`; elsewhere nothing looks, and nothing is spent."""
    checkify.debug_check(jnp.isfinite(x).all(), f"{name} got values that are not finite; they have no codes.")
