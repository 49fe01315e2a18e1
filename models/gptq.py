"""Codes of one weight matrix: the scale that loses least, the nearest codes, and GPTQ's.

Weights are [out, in] with one scale an output channel; codes are symmetric, in [-2**(bits-1), 2**(bits-1) - 1].
Sources: GPTQ, Frantar et al. 2022, arXiv:2210.17323, algorithm 1; the search for the scale and all constants as in
QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, as released.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_GRID, _TRIED, _EXPONENT = 100, 80, 2.4  # candidates a unit of the range, how many of them, norm of the error


@partial(jax.jit, static_argnums=1)
def search_scale(weight: jax.Array, bits: int) -> jax.Array:
    """Scale f16[N] of each row of weight [N, M]: of 80 that cut off more and more, the one of the least error."""
    weight = weight.astype(jnp.float32)
    widest = jnp.abs(weight).max(1) / (2 ** (bits - 1) - 1)

    def body(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scale = (widest * (1 - i / _GRID)).astype(jnp.float16)
        wide = scale.astype(jnp.float32)[:, None]
        error = (jnp.abs(_codes(weight, wide, bits) * wide - weight) ** _EXPONENT).sum(1)
        better = error < best[0]
        return jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])

    nothing = jnp.full(len(weight), jnp.inf), jnp.zeros(len(weight), jnp.float16)
    return lax.fori_loop(0, _TRIED, body, nothing)[1]


@partial(jax.jit, static_argnums=2)
def nearest_codes(weight: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """Round weight [N, M] to codes i8[N, M] of scale f16[N]."""
    return _codes(weight.astype(jnp.float32), scale.astype(jnp.float32)[:, None], bits).astype(jnp.int8)


def gptq_codes(
    weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, bits: int, *, block_size: int = 128, damping: float = 0.01
) -> np.ndarray:
    """Round weight [N, M] column by column, each rounding error made up for by the columns to come.

    Args:
      weight: Of any float dtype.
      gram: f64[M, M], sum of x x^T over the inputs x of the map; its scale does not matter.
      scale: [N], fixed beforehand.
      bits: Of the codes.
      block_size: Columns between two updates of all that follow; changes no result beyond rounding.
      damping: Share of the mean diagonal of `gram` that is added to it.

    Returns:
      Codes i8[N, M]. Columns whose input is always zero get code 0.
    """
    weight, gram = np.array(weight, np.float64), np.array(gram, np.float64)
    step, diagonal = np.asarray(scale, np.float64), np.einsum("ii->i", gram)
    dead = diagonal == 0
    diagonal[dead], weight[:, dead] = 1, 0
    diagonal += damping * diagonal.mean()
    inverse = np.linalg.cholesky(np.linalg.inv(gram)).T  # upper triangular, its product with its transpose
    codes = np.zeros(weight.shape, np.int8)
    for first in range(0, weight.shape[1], block_size):
        here = slice(first, min(first + block_size, weight.shape[1]))
        errors = np.zeros((len(weight), here.stop - first))
        for i in range(first, here.stop):
            codes[:, i] = _nearest(weight[:, i], step, bits)
            error = (weight[:, i] - codes[:, i] * step) / inverse[i, i]
            weight[:, i : here.stop] -= np.outer(error, inverse[i, i : here.stop])
            errors[:, i - first] = error
        weight[:, here.stop :] -= errors @ inverse[here, here.stop :]
    return codes


def _codes(weight: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """Nearest codes, in float32; rows of scale 0 get 0."""
    codes = jnp.round(weight * jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1.0), 0.0))
    return jnp.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _nearest(column: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
    codes = np.round(np.divide(column, step, out=np.zeros_like(column), where=step > 0))
    return np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
