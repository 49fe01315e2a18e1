"""Rotation and quantisation in plain JAX, a block of tokens at a time; rotation alone gains nothing from blocks."""

import math

import jax
from jax import lax

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.hadamard import reference
from pallas_kernels.rows import block_size


def rotate_quantize_pack(x: jax.Array, fmt: Format) -> Quantized:
    """See `api.rotate_quantize_pack`."""
    *b, tokens, dim = x.shape
    block = math.gcd(tokens, block_size(tokens, fmt))
    enc = lax.map(lambda rows: reference.rotate_quantize_pack(rows, fmt), x.reshape(-1, block, dim))
    return jax.tree.map(lambda a: a.reshape(*b, -1, a.shape[-1]), enc)
