"""Hadamard rotation in Triton, Ampere and newer: rows times the matrix on tensor cores, then quantised if asked for.

The matrix's entries are +1 and -1, exact in every type, so tf32 products of a float32 row's halves are as good as one
in float32. It is small and stays in the second-level cache; the time of a rotation is that of reading and writing rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels import triton_calls
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.hadamard.block_sizes import gpu_chunk, gpu_rows, gpu_warps
from pallas_kernels.hadamard.matrix import hadamard_matrix
from pallas_kernels.quantize_pack.gpu import encode, encode_channels, encode_tokens


def hadamard(x: jax.Array, *, interpret: bool = False) -> jax.Array:
    """See `api.hadamard`."""
    dim = x.shape[-1]
    num_rows, width = x.size // dim, _padded(dim)
    rows = gpu_rows(width)
    (out,) = triton_calls.call(
        _rotate,
        (x, _matrix(x, np.arange(dim), width)),
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        (triton.cdiv(num_rows, rows),),
        {"num_rows": num_rows, "dim": dim, "rows": rows, "width": width, **_constants(x, width)},
        interpret=interpret,
        num_warps=gpu_warps(rows, width),
    )
    return out


def rotate_quantize_pack(x: jax.Array, fmt: Format, *, interpret: bool = False) -> Quantized:
    """See `api.rotate_quantize_pack`."""
    dim = x.shape[-1]
    if fmt.axis == "token":  # a tile's channels lie in groups padded to powers of two
        group, padded = fmt.group_size, triton.next_power_of_2(fmt.group_size)
        columns = np.arange(dim) // group * padded + np.arange(dim) % group
        width = channels = triton.next_power_of_2(dim // group) * padded
        kernel, tokens = _rotate_per_token, gpu_rows(width)
    else:
        kernel, tokens, channels = _rotate_per_channel, triton.next_power_of_2(fmt.group_size), min(_padded(dim), 128)
        columns, width = np.arange(dim), triton.cdiv(dim, channels) * channels
    matrix, constants = _matrix(x, columns, width), _constants(x, channels)
    return encode(
        kernel, x, (matrix,), fmt, tokens=tokens, channels=channels, interpret=interpret,
        num_warps=gpu_warps(tokens, channels), **constants,
    )  # fmt: skip


def _padded(dim: int) -> int:
    return max(triton.next_power_of_2(dim), 16)


def _matrix(x: jax.Array, columns: np.ndarray, width: int) -> jax.Array:
    """The matrix in the type of x, its columns where they are wanted among `width`, zero elsewhere."""
    dim = x.shape[-1]
    matrix = np.zeros((_padded(dim), width), np.int8)
    matrix[:dim, columns] = hadamard_matrix(dim)
    return jnp.asarray(matrix, x.dtype)


def _constants(x: jax.Array, width: int) -> dict:
    dim = x.shape[-1]
    return {"chunk": gpu_chunk(dim, width, x.dtype.itemsize), "norm": dim**-0.5}


@triton.jit
def _rotate(
    x_ptr, matrix_ptr, out_ptr,  # [N, D] [D, D] [N, D]
    num_rows: tl.constexpr, dim: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
    chunk: tl.constexpr, norm: tl.constexpr,
):  # fmt: skip
    """Rotate some rows."""
    row, channel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows), tl.arange(0, width)
    y = _product(x_ptr, matrix_ptr, row, row < num_rows, channel, dim, width, chunk, norm)
    mask = (row < num_rows)[:, None] & (channel < dim)[None, :]
    tl.store(out_ptr + row[:, None] * dim + channel[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_per_token(
    x_ptr, matrix_ptr, codes_ptr, scale_ptr, zero_ptr,  # [N, S, D] [D, padded] [N, words, D] [N, S, D/g] [N, S, D/g]
    num_tokens: tl.constexpr, dim: tl.constexpr, group_size: tl.constexpr, group_padded: tl.constexpr,
    bits: tl.constexpr, num_levels: tl.constexpr, symmetric: tl.constexpr, clip: tl.constexpr, largest: tl.constexpr,
    tokens: tl.constexpr, groups: tl.constexpr, chunk: tl.constexpr, norm: tl.constexpr,
):  # fmt: skip
    """Rotate some tokens of a row and quantise all their channels."""
    row = (tl.program_id(0) // tl.cdiv(num_tokens, tokens)).to(tl.int64)
    first = tl.program_id(0) % tl.cdiv(num_tokens, tokens) * tokens
    token = first + tl.arange(0, tokens)
    y = _product(x_ptr, matrix_ptr, row * num_tokens + token, token < num_tokens, tl.arange(0, groups * group_padded),
                 dim, groups * group_padded, chunk, norm)  # fmt: skip
    encode_tokens(tl.reshape(y, (tokens, groups, group_padded)), row, token, first, codes_ptr, scale_ptr, zero_ptr,
                  num_tokens, dim, group_size, bits, num_levels, symmetric, clip, largest)  # fmt: skip


@triton.jit
def _rotate_per_channel(
    x_ptr, matrix_ptr, codes_ptr, scale_ptr, zero_ptr,  # [N, S, D] [D, padded] [N, words, D] [N, S/g, D] [N, S/g, D]
    num_tokens: tl.constexpr, dim: tl.constexpr, group_size: tl.constexpr, group_padded: tl.constexpr,
    bits: tl.constexpr, num_levels: tl.constexpr, symmetric: tl.constexpr, clip: tl.constexpr, largest: tl.constexpr,
    channels: tl.constexpr, chunk: tl.constexpr, norm: tl.constexpr,
):  # fmt: skip
    """Rotate one group of tokens of a row and quantise some channels."""
    row = (tl.program_id(0) // (num_tokens // group_size)).to(tl.int64)
    group = tl.program_id(0) % (num_tokens // group_size)
    channel, element = tl.program_id(1) * channels + tl.arange(0, channels), tl.arange(0, group_padded)
    y = _product(x_ptr, matrix_ptr, row * num_tokens + group * group_size + element, element < group_size, channel,
                 dim, channels * tl.cdiv(dim, channels), chunk, norm)  # fmt: skip
    encode_channels(y, row, group, channel, codes_ptr, scale_ptr, zero_ptr,
                    num_tokens, dim, group_size, bits, num_levels, symmetric, clip, largest)  # fmt: skip


@triton.jit
def _product(
    x_ptr, matrix_ptr, row, exists, column,
    dim: tl.constexpr, width: tl.constexpr, chunk: tl.constexpr, norm: tl.constexpr,
):  # fmt: skip
    """Rows of x times columns of the matrix [D, width], which is orthonormal after `norm`: f32[rows, columns]."""
    y = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for first in tl.range(0, dim, chunk):
        channel = first + tl.arange(0, chunk)
        mask = exists[:, None] & (channel < dim)[None, :]
        x = tl.load(x_ptr + row[:, None] * dim + channel[None, :], mask=mask, other=0.0)
        matrix = tl.load(matrix_ptr + channel[:, None] * width + column[None, :])
        y = tl.dot(x, matrix, y, input_precision="tf32x3")
    return y * norm
