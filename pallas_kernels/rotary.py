"""Rotation of pairs of channels, as rotary position embeddings do it."""

import jax
import jax.numpy as jnp


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate dimension i of x [..., D] with i + n by angles [..., n]; dimensions beyond 2 n pass. Computes in f32."""
    n = cos.shape[-1]
    a, b, rest = (part.astype(jnp.float32) for part in jnp.split(x, (n, 2 * n), -1))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
