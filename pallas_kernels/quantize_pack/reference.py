"""The definition of affine quantisation, in plain JAX.

Divisions by constants and by scales are written as products with reciprocals: compilers rewrite them so anyway, each
in its own way, and the codes of ties would differ between an eager call, a jitted one and a kernel.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.packing import pack, unpack


def quantize_pack(x: jax.Array, fmt: Format) -> Quantized:
    """Fit each group, round to codes with the stored metadata, pack."""
    codes, scale, zero_point = round_to(x, fmt)
    return Quantized(pack(codes, fmt.bits), scale, zero_point)


def quantize_pack_dithered(x: jax.Array, fmt: Format, dither: jax.Array) -> Quantized:
    """The same, rounded up where the fraction exceeds dither f32[*b, S, D] and down elsewhere."""

    def rounded(codes: jax.Array) -> jax.Array:
        whole = jnp.floor(codes)
        return whole + (codes - whole > fmt.split(dither))

    codes, scale, zero_point = round_to(x, fmt, rounded=rounded)
    return Quantized(pack(codes, fmt.bits), scale, zero_point)


def round_to(
    x: jax.Array,
    fmt: Format,
    stretch: jax.Array | float = 1.0,
    rounded: Callable[[jax.Array], jax.Array] = jnp.round,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes u8[*b, S, D], scale and zero point of `quantize_pack`, with scales `stretch` times as wide."""
    groups = fmt.split(x.astype(jnp.float32))
    scale, zero_point = _fit(groups, fmt, stretch)
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1.0), 0.0)
    codes = jnp.clip((groups - zero_point) * inverse, 0, fmt.num_levels - 1)
    codes = rounded(codes).astype(jnp.uint8).reshape(x.shape)
    axis, dtype = fmt.group_axis, fmt.metadata_dtype
    kept = None if fmt.symmetric else zero_point.squeeze(axis).astype(dtype)
    return codes, scale.squeeze(axis).astype(dtype), kept


def dequantize(enc: Quantized, fmt: Format) -> jax.Array:
    """Return codes * scale + zero_point, f32[*b, S, D]."""
    codes = unpack(enc.codes, fmt.bits)
    scale = jnp.expand_dims(enc.scale.astype(jnp.float32), fmt.group_axis)
    if enc.zero_point is None:
        zero_point = -scale * (fmt.num_levels // 2)
    else:
        zero_point = jnp.expand_dims(enc.zero_point.astype(jnp.float32), fmt.group_axis)
    return (fmt.split(codes).astype(jnp.float32) * scale + zero_point).reshape(codes.shape)


def _fit(groups: jax.Array, fmt: Format, stretch: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of each group, rounded to the stored dtype, in float32."""
    axis = fmt.group_axis
    if fmt.symmetric:
        half = fmt.num_levels // 2
        scale = _stored(jnp.abs(groups).max(axis, keepdims=True) * (fmt.clip / half) * stretch, fmt)
        return scale, -scale * half
    low, high = groups.min(axis, keepdims=True), groups.max(axis, keepdims=True)
    return _stored((high - low) * (fmt.clip / (fmt.num_levels - 1)) * stretch, fmt), _stored(low * fmt.clip, fmt)


def _stored(x: jax.Array, fmt: Format) -> jax.Array:
    largest = float(jnp.finfo(fmt.metadata_dtype).max)
    return jnp.clip(x, -largest, largest).astype(fmt.metadata_dtype).astype(jnp.float32)
