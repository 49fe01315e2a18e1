"""The definition of Hadamard rotation: a product with the matrix.

On CPU it is the fastest form as well: at D = 64 to 256 a product takes half the time of butterflies or of two smaller
products, which pass over memory once a factor.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.hadamard.matrix import hadamard_matrix
from pallas_kernels.quantize_pack.reference import quantize_pack


def hadamard(x: jax.Array) -> jax.Array:
    """See `api.hadamard`."""
    return rotated(x).astype(x.dtype)


def rotate_quantize_pack(x: jax.Array, fmt: Format) -> Quantized:
    """See `api.rotate_quantize_pack`."""
    return quantize_pack(rotated(x), fmt)


def rotated(x: jax.Array) -> jax.Array:
    """Rotate in float32: [*b, D] -> f32[*b, D]."""
    dim = x.shape[-1]
    matrix = jnp.asarray(hadamard_matrix(dim), jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), matrix, precision="highest") * dim**-0.5
