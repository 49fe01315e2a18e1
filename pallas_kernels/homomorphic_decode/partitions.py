"""Partitions of a contraction: what they are quantised to, and the sums that the corrections need.

Inside a partition both operands are affine, a ~ sa * a' + ma and b ~ sb * b' + mb, so that
sum a b ~ sa sb sum(a' b') + sa mb sum(a') + ma sb sum(b') + size ma mb.
Source: HACK, Zhang et al. 2025, arXiv:2502.03589.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.packing import unpack

_TINY = 1e-30  # a step below it is no step: the reciprocal would overflow


def sums_dtype(fmt: Format) -> jnp.dtype:
    """The narrowest integers that hold the sum of a group's codes."""
    largest = (fmt.num_levels - 1) * fmt.group_size
    return jnp.dtype("uint8" if largest < 2**8 else "int16" if largest < 2**15 else "int32")


def code_sums(enc: Quantized, fmt: Format) -> jax.Array:
    """Sum the codes of every group, shaped as its scales: what `homomorphic_decode` wants stored beside them."""
    codes = fmt.split(unpack(enc.codes, fmt.bits))
    return codes.sum(fmt.group_axis, dtype=jnp.int32).astype(sums_dtype(fmt))


def centre(fmt: Format) -> int:
    """What is taken off codes so that they fit int8: 128 at 8 bits."""
    return 128 if fmt.bits == 8 else 0


def zero_point(enc: Quantized, scale: jax.Array, fmt: Format) -> jax.Array:
    """Offsets of the groups in float32, stored or implied by symmetry."""
    return -scale * (fmt.num_levels // 2) if enc.zero_point is None else enc.zero_point.astype(jnp.float32)


def split(x: jax.Array, size: int) -> jax.Array:
    """Cut the last axis into partitions: [*b, R, G * size] -> [*b, G, R, size]."""
    return x.reshape(*x.shape[:-1], -1, size).swapaxes(-2, -3)


def block_diagonal(codes: jax.Array) -> jax.Array:
    """[*b, G, R, size] -> [*b, G * R, G * size], zero outside a row's own partition.

    One plain product then does the work of G small ones, 4 times as fast on CPU and with all lanes in use on TPU.
    """
    *b, partitions, num_queries, size = codes.shape
    own = jnp.eye(partitions, dtype=codes.dtype).reshape(*(1,) * len(b), partitions, 1, partitions, 1)
    return (codes[..., None, :] * own).reshape(*b, partitions * num_queries, partitions * size)


def to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantise partitions x f32[..., size] to codes i8, scale f32[..., 1] and offset f32[..., 1], to the nearest.

    Codes run over -128 .. 127. A constant partition gets scale 0; nothing of it but the offset counts. A partition of
    probabilities with a dead slot has minimum 0, so that dead slots come back as exactly 0 up to rounding.
    """
    low = x.min(-1, keepdims=True)
    scale, inverse = step_to_int8(low, x.max(-1, keepdims=True))
    codes = jnp.clip(jnp.round((x - low) * inverse), 0, 255) - 128
    return codes.astype(jnp.int8), scale, low + 128 * scale


def rounded(x: jax.Array, size: int) -> jax.Array:
    """What partitions of `size` along the last axis come back as after rounding to 8 bits."""
    codes, scale, offset = to_int8(x.reshape(*x.shape[:-1], -1, size))
    return (codes.astype(jnp.float32) * scale + offset).reshape(x.shape)


def step_to_int8(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale of partitions that run from `low` to `high`, and its reciprocal; both 0 for a constant one."""
    scale = (high - low) * (1 / 255)
    live = scale > _TINY
    return jnp.where(live, scale, 0.0), jnp.where(live, 1 / jnp.where(live, scale, 1.0), 0.0)
