"""Hadamard rotation on TPU in Pallas: rows stream through the matrix unit, the matrix stays in VMEM.

Its entries are +1 and -1, exact in bfloat16; a float32 row is the sum of three bfloat16 rows, so three products are as
good as one in float32, which would take six. XLA keeps arrays whose last axis does not fill 128 lanes with the axis
before it in the lanes; such rows are rotated as they lie, as columns, or both sides would be copied.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.hadamard.block_sizes import TPU_ROWS
from pallas_kernels.hadamard.matrix import hadamard_matrix
from pallas_kernels.quantize_pack import tpu as quantize_tpu
from pallas_kernels.tpu_rows import refuse_float16

_LANES = 128


def hadamard(x: jax.Array, *, interpret: bool = False) -> jax.Array:
    """See `api.hadamard`."""
    refuse_float16(x)
    dim = x.shape[-1]
    columns = dim % _LANES != 0 and x.ndim > 1
    rows = x.reshape(-1, *x.shape[-2:]).swapaxes(1, 2) if columns else x.reshape(1, -1, dim)  # [b, D, S] or [1, N, D]
    num_rows = rows.shape[2 if columns else 1]
    block = min(TPU_ROWS, num_rows)
    # Both walk the rows; what lies beyond the last one is not kept.
    as_rows = pl.BlockSpec((None, block, dim), lambda b, i: (b, i, 0))
    as_columns = pl.BlockSpec((None, dim, block), lambda b, i: (b, 0, i))
    row_spec = as_columns if columns else as_rows
    out = pl.pallas_call(
        functools.partial(_kernel, columns=columns),
        grid=(rows.shape[0], pl.cdiv(num_rows, block)),
        in_specs=[row_spec, pl.BlockSpec((dim, dim), lambda b, i: (0, 0))],
        out_specs=row_spec,
        out_shape=jax.ShapeDtypeStruct(rows.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="hadamard",
    )(rows, _matrix(dim))
    return (out.swapaxes(1, 2) if columns else out).reshape(x.shape)


def rotate_quantize_pack(x: jax.Array, fmt: Format, *, interpret: bool = False) -> Quantized:
    """See `api.rotate_quantize_pack`."""
    return quantize_tpu.quantize_pack(x, fmt, interpret=interpret, first=(_rotated, _matrix(x.shape[-1])))


def _matrix(dim: int) -> jax.Array:
    return jnp.asarray(hadamard_matrix(dim), jnp.bfloat16)


def _kernel(x_ref, matrix_ref, out_ref, *, columns: bool):
    """Rotate one block of rows, or of columns."""  # refs: [N, D] or [D, N], [D, D] -> as the first
    out_ref[...] = _rotated(x_ref[...], matrix_ref[...], columns).astype(out_ref.dtype)


def _rotated(rest: jax.Array, matrix: jax.Array, columns: bool) -> jax.Array:
    """Rows [N, D], or columns [D, N], rotated by matrix [D, D], in float32."""
    total = jnp.zeros(rest.shape, jnp.float32)
    for _ in range(1 if rest.dtype == jnp.bfloat16 else 3):
        part = rest.astype(jnp.bfloat16)
        operands = (matrix, part) if columns else (part, matrix)
        total += jnp.dot(*operands, preferred_element_type=jnp.float32)
        rest = rest - part.astype(rest.dtype)
    return total * matrix.shape[0] ** -0.5
