"""Random draws that neither chunks nor other rows change: by a hash of the place."""

import jax
import jax.numpy as jnp


def hashed(at: jax.Array) -> jax.Array:
    """Mix the bits of each number, by the finaliser of MurmurHash3: different numbers stay different."""
    x = at.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
