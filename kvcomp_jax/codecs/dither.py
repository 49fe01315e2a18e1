"""Uniform noise that a token's place in the text decides, for stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np


def uniform(pos: jax.Array, dim: int, seed: int) -> jax.Array:
    """Return f32[*b, S, D] in [0, 1) from positions i32[*b, S]: a hash of seed, position and channel.

    A token gets the same noise whenever and wherever it is encoded, so that a stream and a whole prompt give equal
    codes, and rows stay independent; rows and heads share it. Both hashes are MurmurHash3's 32-bit finaliser.
    """
    channel = _mixed(jnp.arange(dim, dtype=jnp.uint32) + jnp.uint32(seed % 2**32 * 0x9E3779B9 % 2**32))
    token = _mixed(pos.astype(jnp.uint32) + jnp.uint32(0x85EBCA77))
    bits = _mixed(token[..., None] ^ channel.reshape(*(1,) * pos.ndim, dim))
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
