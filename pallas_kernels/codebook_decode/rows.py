"""Rows as codes of non-uniform levels, with whatever makes rows of levels: their layout, and plain JAX to read them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.packing import unpack
from pallas_kernels.rotary import cos_sin, turn


class CodebookRows(NamedTuple):
    """x = rotated((levels[codes] * scale + zero_point + outliers) * channel_scale + channel_zero_point).

    What is None is left out.
    Codes and what is kept a token have a head axis of K, or of 1 where they join the heads of a token: C is D or K D.
    """

    codes: jax.Array  # u32[B, K or 1, S * bits // 32, C], see `packing`
    levels: jax.Array | np.ndarray  # f32[2**bits]
    scale: jax.Array | None = None  # [B, K or 1, S]
    zero_point: jax.Array | None = None  # as scale
    outliers: jax.Array | None = None  # [B, K or 1, S, m], what is added to some channels
    outlier_channels: jax.Array | None = None  # u8 or u16[B, K or 1, S, m], which of the C; each at most once a token
    channel_scale: jax.Array | None = None  # f32[B, K, D]
    channel_zero_point: jax.Array | None = None  # f32[B, K, D]
    rope: jax.Array | np.ndarray | None = None  # f32[2, n]: radians a position, and a factor, of each pair i and i + n

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.levels).bit_length() - 1

    @property
    def num_slots(self) -> int:
        """S."""
        return self.codes.shape[2] * 32 // self.bits

    @property
    def num_outliers(self) -> int:
        """Outliers a token."""
        return 0 if self.outliers is None else self.outliers.shape[-1]

    @property
    def by_token(self) -> bool:
        """Whether channels have no units yet and nothing rotates, so that joining and outliers may come on top."""
        return self.channel_scale is None and self.channel_zero_point is None and self.rope is None

    def cut(self, first: jax.Array, size: int) -> "Stored":
        """What is stored of slots first .. first + size, whole words."""

        def one(x: jax.Array | None) -> jax.Array | None:
            if x is None:
                return None
            rows = x.shape[2]
            return lax.dynamic_slice_in_dim(x, first * rows // self.num_slots, size * rows // self.num_slots, 2)

        return Stored(*(one(getattr(self, name)) for name in Stored._fields))

    def with_stored(self, stored: "Stored") -> "CodebookRows":
        """Rows of other slots."""
        return self._replace(**stored._asdict())


class Stored(NamedTuple):
    """The arrays of `CodebookRows` that have slots."""

    codes: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None
    outliers: jax.Array | None
    outlier_channels: jax.Array | None


def decoded(x: CodebookRows, heads: int, pos: jax.Array | None) -> jax.Array:
    """All rows f32[B, K, S, D] of K = `heads`, at positions i32[B, K or 1, S] where they rotate."""
    rows = look_up(unpack(x.codes, x.bits), x.levels)
    if x.scale is not None:
        rows = rows * x.scale.astype(jnp.float32)[..., None]
    if x.zero_point is not None:
        rows = rows + x.zero_point.astype(jnp.float32)[..., None]
    if x.outliers is not None and x.outlier_channels is not None:
        rows = rows + place(jnp.zeros(()), x.outlier_channels, x.outliers.astype(jnp.float32), rows.shape[-1])
    if rows.shape[1] != heads:
        batch, _, slots, channels = rows.shape
        rows = rows.reshape(batch, slots, heads, channels // heads).swapaxes(1, 2)
    if x.channel_scale is not None:
        rows = rows * x.channel_scale[:, :, None]
    if x.channel_zero_point is not None:
        rows = rows + x.channel_zero_point[:, :, None]
    if x.rope is None or pos is None:
        return rows
    frequency, factor = jnp.asarray(x.rope).reshape(2, 1, 1, 1, -1)
    cos, sin = cos_sin(pos[..., None].astype(jnp.float32) * frequency)
    return turn(rows, cos * factor, sin * factor)


def look_up(codes: jax.Array, levels: jax.Array | np.ndarray) -> jax.Array:
    """Return f32 levels[codes] for 2**bits levels.

    Halves the candidates with each bit of the code, 2**bits - 1 selections a value: gathers are slow on CPU.
    """
    candidates = [jnp.float32(levels[i]) for i in range(len(levels))]
    bit = 0
    while len(candidates) > 1:
        odd = (codes >> bit) & 1 != 0
        candidates = [jnp.where(odd, b, a) for a, b in zip(candidates[::2], candidates[1::2], strict=True)]
        bit += 1
    return jnp.broadcast_to(candidates[0], codes.shape)


def place(rest: jax.Array, index: jax.Array, values: jax.Array, dim: int) -> jax.Array:
    """Put values [*b, m] at channels index [*b, m] of rows [*b, dim], `rest` elsewhere.

    A selection an outlier and channel, fused with what makes the row: XLA on CPU scatters one value at a time, a
    microsecond each, and TPUs hardly better.
    """
    channel = jnp.arange(dim).reshape(*(1,) * (index.ndim - 1), dim)
    out = jnp.broadcast_to(rest, (*index.shape[:-1], dim))
    for i in range(index.shape[-1]):
        out = jnp.where(index[..., i : i + 1] == channel, values[..., i : i + 1], out)
    return out
