"""Queries as the TPU kernel multiplies them: with all that keys have by channel folded in, and ready to turn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.codebook_decode.rows import CodebookRows


class Queries(NamedTuple):
    """What multiplies keys, f32[B, K, R, W] each, with units and factors of channels folded in."""

    own: jax.Array  # times a channel
    cross: jax.Array | None  # times a channel that has turned a quarter more, if keys rotate
    shift: jax.Array | None  # for the zero points of channels: times the lanes' cosines, or ones
    unit: jax.Array | None  # for the zero points of tokens, likewise


def queries(q: jax.Array, k: CodebookRows, width: int) -> Queries:
    """Fold into `padded` queries [B, K, R, D] what keys have by channel.

    A pair (a, b) that turns by t meets queries (c, d): a cos t c + b sin t (-c) + a sin t d + b cos t d. So lanes of a
    head's first half meet cosines and those of the second half sines in one product, and the other way round in
    another, and no lane of the keys moves.
    """
    scale, zero_point = (None if x is None else x[:, :, None] for x in (k.channel_scale, k.channel_zero_point))
    ones = jnp.ones(q.shape, jnp.float32)
    unit = ones if scale is None else scale

    def wide(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))

    if k.rope is None:
        own, cross, rotated = q * unit, None, q
        shift = None if zero_point is None else rotated * zero_point
        each = None if k.zero_point is None else own
        return Queries(wide(own), cross, wide(shift), wide(each))  # type: ignore[arg-type]
    n = k.rope.shape[1]
    factor = jnp.broadcast_to(jnp.asarray(k.rope)[1], (*q.shape[:-1], n))
    c, d, rest = q[..., :n] * factor, q[..., n : 2 * n] * factor, q[..., 2 * n :]
    own = jnp.concatenate([c, -c, rest], -1) * unit
    cross = jnp.concatenate([d, d, jnp.zeros_like(rest)], -1) * unit

    def turned(x: jax.Array) -> jax.Array:
        """What rows of x in every slot give, as multiples of the lanes' cosines."""
        a, b, other = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
        return jnp.concatenate([a * c + b * d, a * d - b * c, other * rest], -1)

    shift = None if zero_point is None else turned(zero_point)
    each = None if k.zero_point is None else turned(jnp.broadcast_to(unit, q.shape))
    return Queries(wide(own), wide(cross), wide(shift), wide(each))  # type: ignore[arg-type]


def lane_turns(rope: jax.Array, width: int) -> jax.Array:
    """Radians a position and phase of each lane, f32[2, W]: n cosines, n sines, and lanes that do not turn."""
    n = rope.shape[1]
    frequency = jnp.concatenate([rope[0], rope[0]])
    phase = jnp.concatenate([jnp.zeros(n), jnp.full(n, jnp.pi / 2)]).astype(jnp.float32)
    return jnp.pad(jnp.stack([frequency, phase]), ((0, 0), (0, width - 2 * n)))
