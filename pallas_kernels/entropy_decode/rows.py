"""Rows of either storage: their codes, and the two products of attention by whole units."""

from typing import cast

import jax
import jax.numpy as jnp

from pallas_kernels.entropy_decode import planes, streams
from pallas_kernels.entropy_decode.formats import PlaneFormat, Planes, StreamFormat, Streams

Rows = Streams | Planes
RowFormat = StreamFormat | PlaneFormat
FEW = 16  # queries up to which symbols are multiplied as they are decoded; matrix products pay beyond


def num_slots(x: Rows, fmt: RowFormat) -> int:
    """Tokens that x has room for."""
    return (x.choice if isinstance(x, Streams) else x.heads).shape[2] * fmt.block


def codes_of(x: Rows, lengths: jax.Array | None, fmt: RowFormat) -> jax.Array:
    """Codes u8[*b, S, D]; `lengths` u8[*b, J, n] are the tables of streams."""
    if isinstance(x, Planes) and isinstance(fmt, PlaneFormat):
        return planes.read(x, fmt)
    if isinstance(x, Streams) and isinstance(fmt, StreamFormat) and lengths is not None:
        return streams.read(x, lengths, fmt)
    raise TypeError(f"{type(x).__name__} do not fit {type(fmt).__name__}; streams need tables of code lengths, too.")


def dequantize(codes: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    """codes * scale + zero_point, f32[*b, S, D], for scales [*b, rows, cols] with rows | S and cols | D."""
    *b, num_tokens, dim = codes.shape
    *_, rows, cols = scale.shape
    parts = codes.astype(jnp.float32).reshape(*b, rows, num_tokens // rows, cols, dim // cols)
    scale, zero_point = (x.astype(jnp.float32)[..., :, None, :, None] for x in (scale, zero_point))
    return (parts * scale + zero_point).reshape(codes.shape)


def decoded(x: Rows, lengths: jax.Array | None, fmt: RowFormat) -> jax.Array:
    """All rows, f32[*b, S, D]."""
    return dequantize(codes_of(x, lengths, fmt), x.scale, x.zero_point)


def dot(q: jax.Array, x: Rows, lengths: jax.Array | None, fmt: RowFormat) -> jax.Array:
    """q . X^T, f32[*b, R, S], for q f32[*b, R, D]."""
    if not _fuses(q, x, fmt):
        return jnp.einsum("...rd,...sd->...rs", q, decoded(x, lengths, fmt), preferred_element_type=jnp.float32)
    x, fmt = cast(Streams, x), cast(StreamFormat, fmt)
    scale, zero_point = _oriented(x, fmt)  # [*b, 1, units, lines or 1, line or 1]
    units = x.choice.shape[-1]
    if fmt.along == "token":
        weights = q[..., None, :] * scale[..., 0, :] if scale.shape[-2] == 1 else q[..., None, :]
        out = streams.along_lines(weights, x, lengths, fmt)  # [*b, R, units, P]
        out = out if scale.shape[-2] == 1 else out * scale[..., 0]
        out = out + _times(q[..., None, None, :], zero_point)
    else:
        each = jnp.broadcast_to(q[..., None, :], (*q.shape[:-1], units, q.shape[-1]))
        weights = each if scale.shape[-2] == 1 else each * scale[..., 0]
        out = streams.across_lines(weights, x, lengths, fmt)
        out = out * scale[..., 0, :] if scale.shape[-2] == 1 else out
        out = out + (each[..., None] * zero_point).sum(-2)
    return out.reshape(*out.shape[:-2], -1)


def mix(p: jax.Array, x: Rows, lengths: jax.Array | None, fmt: RowFormat) -> jax.Array:
    """p . X, f32[*b, R, D], for p f32[*b, R, S]."""
    if not _fuses(p, x, fmt):
        return jnp.einsum("...rs,...sd->...rd", p, decoded(x, lengths, fmt), preferred_element_type=jnp.float32)
    x, fmt = cast(Streams, x), cast(StreamFormat, fmt)
    scale, zero_point = _oriented(x, fmt)
    p = p.reshape(*p.shape[:-1], x.choice.shape[-1], fmt.block)  # [*b, R, units, P]
    if fmt.along == "token":
        weights = p if scale.shape[-2] == 1 else p * scale[..., 0]
        out = streams.across_lines(weights, x, lengths, fmt)  # [*b, R, units, D]
        out = out * scale[..., 0, :] if scale.shape[-2] == 1 else out
        out = out + (p[..., None] * zero_point).sum(-2)
    else:
        weights = p * scale[..., 0, :] if scale.shape[-2] == 1 else p
        out = streams.along_lines(weights, x, lengths, fmt)
        out = out if scale.shape[-2] == 1 else out * scale[..., 0]
        out = out + _times(p[..., None, :], zero_point)
    return out.sum(-2)


def _times(a: jax.Array, zero_point: jax.Array) -> jax.Array:
    """Sum over a line of a [*b, R, units or 1, 1, line] * zero_point [*b, 1, units, lines or 1, line or 1]."""
    return (a * zero_point).sum(-1)


def _fuses(a: jax.Array, x: Rows, fmt: RowFormat) -> bool:
    """Whether products with few queries run on symbols: scales must fold into the factor on either side."""
    if not isinstance(x, Streams) or not isinstance(fmt, StreamFormat) or a.shape[-2] > FEW:
        return False
    per_token = x.scale.shape[-2] != x.choice.shape[-1]
    return not (per_token and x.scale.shape[-1] > 1)


def _oriented(x: Streams, fmt: StreamFormat) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point as f32[*b, 1, units, lines or 1, line or 1]."""
    units = x.choice.shape[-1]

    def one(a: jax.Array) -> jax.Array:
        a = a.astype(jnp.float32).reshape(*a.shape[:-2], 1, units, -1, a.shape[-1])
        wide = [1 if n == 1 else size // n for n, size in zip(a.shape[-2:], (fmt.block, fmt.head_dim), strict=True)]
        a = jnp.repeat(jnp.repeat(a, wide[0], -2), wide[1], -1)
        return a if fmt.along == "token" else a.swapaxes(-1, -2)

    return one(x.scale), one(x.zero_point)
