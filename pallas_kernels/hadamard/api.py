"""Public functions of Hadamard rotation: checks and dispatch."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.hadamard.matrix import hadamard_matrix
from pallas_kernels.quantize_pack.api import check_groups


def hadamard(x: jax.Array, *, implementation: str | None = None, interpret: bool = False) -> jax.Array:
    """Rotate the last axis by the symmetric orthonormal Hadamard matrix; doing it twice changes nothing.

    Args:
      x: [*b, D], f32 or bf16; D a power of two, or 12, 20 or 28 times one.
      implementation: See `pallas_kernels.dispatch.call`.
      interpret: Run a Pallas or Triton backend in its interpreter.

    Returns:
      [*b, D] in x's dtype, summed in float32.

    Raises:
      ValueError: If there is no matrix for D.
    """
    hadamard_matrix(x.shape[-1])
    return dispatch.call("hadamard", implementation, x, interpret=interpret)


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
    hadamard_matrix(x.shape[-1])
    check_groups(x, fmt)
    return dispatch.call("hadamard", implementation, x, fmt, function="rotate_quantize_pack", interpret=interpret)
