"""Public functions of Hadamard rotation: checks and dispatch."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.finite import check_finite
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.hadamard.matrix import LARGEST_DENSE, check_hadamard, factors, largest_order
from pallas_kernels.quantize_pack.api import check_groups


def hadamard(x: jax.Array, *, implementation: str | None = None, interpret: bool = False) -> jax.Array:
    """Rotate the last axis by the symmetric orthonormal Hadamard matrix; doing it twice changes nothing.

    Beyond 512 channels the matrix is a Kronecker product, and its factors are applied one after the other.

    Args:
      x: [*b, D], f32 or bf16; D of an order that `matrix` has.
      implementation: See `pallas_kernels.dispatch.call`.
      interpret: Run a Pallas or Triton backend in its interpreter.

    Returns:
      [*b, D] in x's dtype, summed in float32.

    Raises:
      ValueError: If there is no matrix for D.
    """
    dim = x.shape[-1]
    check_hadamard(dim)
    rotate = partial(dispatch.call, "hadamard", implementation, interpret=interpret)
    if dim <= LARGEST_DENSE or len(orders := factors(dim)) == 1:
        return rotate(x)
    y = x.astype(jnp.float32)  # rounded once, at the end
    for i, order in enumerate(orders):
        y = y.reshape(*x.shape[:-1], math.prod(orders[:i]), order, math.prod(orders[i + 1 :]))
        y = rotate(y.swapaxes(-1, -2)).swapaxes(-1, -2) if y.shape[-1] > 1 else rotate(y[..., 0])
    return y.reshape(x.shape).astype(x.dtype)


def hadamard_blocks(x: jax.Array, *, implementation: str | None = None, interpret: bool = False) -> jax.Array:
    """Rotate consecutive blocks of the last axis, as long as a matrix allows: all of it where there is one.

    Orthonormal, symmetric and its own inverse as `hadamard` is, for every size: 11008 channels are 43 blocks of 256, 9
    channels stay as they are. Arguments as in `hadamard`.
    """
    blocks = x.reshape(*x.shape[:-1], -1, largest_order(x.shape[-1]))
    return hadamard(blocks, implementation=implementation, interpret=interpret).reshape(x.shape)


def rotate_quantize_pack(
    x: jax.Array, fmt: Format, *, implementation: str | None = None, interpret: bool = False
) -> Quantized:
    """Rotate rows and quantise what comes out, in one pass over x; the rotated rows are not rounded in between.

    Args:
      x: [*b, S, D], f32 or bf16, D as in `hadamard`, otherwise as in `quantize_pack`.
      fmt, implementation, interpret: As in `quantize_pack`.

    Raises:
      ValueError: If there is no matrix for D or `fmt` does not divide x.
    """
    check_hadamard(x.shape[-1])
    check_groups(x, fmt)
    check_finite(x, "rotate_quantize_pack")
    return dispatch.call("hadamard", implementation, x, fmt, function="rotate_quantize_pack", interpret=interpret)
