"""Quantise and pack rows on TPUs, in one pass over x.

A block is turned so that a group runs along sublanes, whichever axis it covers: the extremes of a group are then
elementwise over registers. Codes are turned so that tokens run along sublanes and are packed by strided reads.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.quantize_pack.block_sizes import TPU_BLOCK
from pallas_kernels.tpu_rows import (
    LANES,
    SUBLANES,
    block_step,
    float_of_half,
    half_of_float,
    lane_slices,
    metadata_out,
    refuse_float16,
    store_words,
    tokens_along_lanes,
)

First = tuple[Callable[[jax.Array, jax.Array, bool], jax.Array], jax.Array]


def quantize_pack(x: jax.Array, fmt: Format, *, interpret: bool = False, first: First | None = None) -> Quantized:
    """See `api.quantize_pack`.

    `first` is what happens to x before: a function of a block (rows, or columns where the last argument says so) and a
    matrix that every block sees, and that matrix.
    """
    *b, num_slots, dim = x.shape
    refuse_float16(x)
    if fmt.group_size % SUBLANES:
        raise Unsupported(f"quantize_pack/tpu needs group_size % {SUBLANES} == 0, got {fmt.group_size}.")
    turned, step = tokens_along_lanes(dim), block_step(dim, fmt)
    block = step * max(1, min(TPU_BLOCK, num_slots) // step)
    x = x.reshape(-1, num_slots, dim)

    def spec(tokens: int, channels: int, tokens_last: bool) -> pl.BlockSpec:
        """Blocks of `tokens` by `channels`, walked along tokens."""
        if tokens_last:
            return pl.BlockSpec((None, channels, tokens), lambda n, j: (n, 0, j))
        return pl.BlockSpec((None, tokens, channels), lambda n, j: (n, j, 0))

    def output(tokens_per: int, per_tokens: int, channels: int, tokens_last: bool, dtype):
        """An output with `tokens_per` rows every `per_tokens` tokens: its spec and shape."""
        rows = num_slots * tokens_per // per_tokens
        shape = (channels, rows) if tokens_last else (rows, channels)
        out = jax.ShapeDtypeStruct((x.shape[0], *shape), dtype)
        return spec(block * tokens_per // per_tokens, channels, tokens_last), out

    held = jnp.int16 if fmt.metadata_dtype == "float16" else jnp.dtype(fmt.metadata_dtype)
    codes_dtype = jnp.uint8 if fmt.bits == 8 else jnp.uint32
    codes = output(*((1, 1) if fmt.bits == 8 else (fmt.bits, 32)), dim, turned, codes_dtype)
    if fmt.axis == "token":
        metadata_last, metadata = True, output(1, 1, dim // fmt.group_size, True, held)
    else:
        metadata_last, metadata = turned, output(1, fmt.group_size, dim, turned, held)
    outputs = [codes, metadata] if fmt.symmetric else [codes, metadata, metadata]
    rows = block if fmt.bits == 8 else block * fmt.bits // 32
    packed, *parts = pl.pallas_call(
        partial(_kernel, fmt=fmt, turned=turned, first=first and first[0]),
        grid=(x.shape[0], pl.cdiv(num_slots, block)),
        in_specs=[spec(block, dim, turned), first and pl.BlockSpec(first[1].shape, lambda n, j: (0, 0))],
        out_specs=[spec for spec, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        scratch_shapes=[pltpu.VMEM((n, min(dim, LANES)), jnp.uint32) for n in (block, rows)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=64 * 2**20),
        interpret=interpret,
        name="quantize_pack",
    )(x.swapaxes(1, 2) if turned else x, first and first[1])

    def whole(part: jax.Array, tokens_last: bool) -> jax.Array:
        part = part.swapaxes(1, 2) if tokens_last else part
        return part.reshape(*b, *part.shape[1:])

    scale, *zero_point = (metadata_out(whole(part, metadata_last), fmt.metadata_dtype) for part in parts)
    return Quantized(whole(packed, turned), scale, zero_point[0] if zero_point else None)


def _kernel(x_ref, matrix_ref, codes_ref, scale_ref, *rest, fmt: Format, turned: bool, first: Callable | None):
    """Quantise one block."""  # [P, D] or, `turned`, [D, P]
    *zero_ref, codes_scratch, words_scratch = rest
    x = first(x_ref[...], matrix_ref[...], turned) if first else x_ref[...].astype(jnp.float32)
    per_token = fmt.axis == "token"
    x = x if turned == per_token else x.T  # [D, P] per token, [P, D] per channel
    groups = x.reshape(x.shape[0] // fmt.group_size, fmt.group_size, x.shape[1])
    scale, zero_point = _fit(groups, fmt)
    for ref, (held, _) in zip((scale_ref, *zero_ref), (scale, zero_point), strict=False):
        held = held.reshape(groups.shape[0], groups.shape[2])
        ref[...] = (held.T if turned and not per_token else held).astype(ref.dtype)
    inverse = jnp.where(scale[1] > 0, 1 / jnp.where(scale[1] > 0, scale[1], 1.0), 0.0)
    codes = jnp.clip((groups - zero_point[1]) * inverse, 0, fmt.num_levels - 1)
    codes = jnp.round(codes).astype(jnp.int32).reshape(x.shape)
    if fmt.bits == 8:
        codes_ref[...] = (codes if turned == per_token else codes.T).astype(jnp.uint8)
        return
    codes, parts = lax.bitcast_convert_type(codes.T if per_token else codes, jnp.uint32), []  # [P, D]
    for lanes in lane_slices(codes.shape[1]):
        part = codes[:, lanes]
        codes_scratch[:, : part.shape[1]] = part
        store_words(codes_scratch, words_scratch, fmt.bits)
        parts.append(words_scratch[:, : part.shape[1]])
    words = jnp.concatenate(parts, 1)
    codes_ref[...] = (
        lax.bitcast_convert_type(lax.bitcast_convert_type(words, jnp.int32).T, jnp.uint32) if turned else words
    )


def _fit(groups: jax.Array, fmt: Format) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Scale and zero point of groups f32[n, g, L]: each as stored and as f32, [n, 1, L]. As in the reference."""
    if fmt.symmetric:
        half = fmt.num_levels // 2
        scale = _stored(jnp.abs(groups).max(1, keepdims=True) * (fmt.clip / half), fmt)
        return scale, (scale[0], -scale[1] * half)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    return _stored((high - low) * (fmt.clip / (fmt.num_levels - 1)), fmt), _stored(low * fmt.clip, fmt)


def _stored(x: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """Metadata as it is stored (bits in i32 for float16), and its value in f32."""
    largest = float(jnp.finfo(fmt.metadata_dtype).max)
    x = jnp.clip(x, -largest, largest)
    if fmt.metadata_dtype == "float16":
        held = half_of_float(x)
        return held, float_of_half(held)
    held = x.astype(fmt.metadata_dtype)
    return held, held.astype(jnp.float32)
