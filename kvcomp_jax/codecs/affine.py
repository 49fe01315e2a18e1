"""Uniform quantisation: codes, a scale and a zero point a group."""

from typing import Literal

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.base import Codec
from kvcomp_jax.codecs.packing import BITS, pack, pack_unit, unpack
from kvcomp_jax.types import pytree, static

AXES = ("token", "channel")


@pytree
class Grouped:
    """Packed codes with one scale and zero point a group; x ~ codes * scale + zero_point."""

    codes: jax.Array  # u32[*b, S * bits // 32, D], words along tokens; u8[*b, S, D] at 8 bits
    scale: jax.Array  # [*b, S, D // group_size] per token, [*b, S // group_size, D] per channel
    zero_point: jax.Array | None  # as scale, in units of x; None when symmetric


@pytree
class Affine(Codec):
    """Round to the nearest of 2**bits evenly spaced levels between a group's minimum and maximum.

    axis="token" groups `group_size` channels of one token (None: the whole head), axis="channel" groups `group_size`
    consecutive tokens of one channel. Symmetric uses 2**bits - 1 levels around zero and stores no zero point.
    Scale and zero point are rounded to `metadata_dtype` first and the codes taken with the rounded ones, so the
    error is at most scale / 2 beyond that rounding; metadata saturates at that dtype's largest value. Constant groups
    get code 0 and come back as their minimum.
    Source: KIVI, Liu et al. 2024, arXiv:2402.02750, equations 1-2; symmetric as in MaxText's quantised cache.
    """

    bits: int = static()
    axis: Literal["token", "channel"] = static()
    group_size: int | None = static(default=None)
    symmetric: bool = static(default=False)
    metadata_dtype: str = static(default="float16")

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} must be one of {', '.join(map(str, BITS))}.")
        if self.axis not in AXES:
            raise ValueError(f"axis={self.axis!r} must be 'token' or 'channel'.")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1.")
        if self.axis == "channel":
            if self.group_size is None:
                raise ValueError("axis='channel' needs a group_size in tokens, e.g. 32.")
            if (self.group_size or 0) % pack_unit(self.bits):
                raise ValueError(
                    f"group_size={self.group_size} must be a multiple of {pack_unit(self.bits)} tokens, "
                    f"the tokens that share words at {self.bits} bits."
                )

    @property
    def unit(self) -> int:
        """Tokens that share a word or a scale."""
        return (self.group_size or 1) if self.axis == "channel" else pack_unit(self.bits)

    def encode(self, x: jax.Array, pos: jax.Array) -> Grouped:
        """Quantise x [*b, S, D]; S a multiple of `unit`."""
        del pos
        groups = self._split(x.astype(jnp.float32))
        scale, zero_point = self._fit(groups)
        codes = (groups - zero_point) / jnp.where(scale > 0, scale, 1.0)
        codes = jnp.round(jnp.clip(codes, 0, self._num_levels - 1)).astype(jnp.uint8).reshape(x.shape)
        axis = self._group_axis
        kept = None if self.symmetric else zero_point.squeeze(axis).astype(self.metadata_dtype)
        scale = scale.squeeze(axis).astype(self.metadata_dtype)
        return Grouped(codes=pack(codes, self.bits), scale=scale, zero_point=kept)

    def decode(self, enc: Grouped, pos: jax.Array) -> jax.Array:
        """Return codes * scale + zero_point, f32[*b, S, D]."""
        del pos
        codes = unpack(enc.codes, self.bits)
        shape = codes.shape
        scale = jnp.expand_dims(enc.scale.astype(jnp.float32), self._group_axis)
        if enc.zero_point is None:
            zero_point = -scale * (self._num_levels // 2)
        else:
            zero_point = jnp.expand_dims(enc.zero_point.astype(jnp.float32), self._group_axis)
        return (self._split(codes).astype(jnp.float32) * scale + zero_point).reshape(shape)

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of the codes and the metadata; `num_tokens` counts in whole units."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return num_tokens * head_dim * self.bits + self.metadata_bits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of scales and zero points."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        num_groups = num_tokens * head_dim // (self.group_size or head_dim)
        return num_groups * jnp.dtype(self.metadata_dtype).itemsize * 8 * (1 if self.symmetric else 2)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if group_size does not divide what it groups."""
        if self.axis == "token" and self.group_size is not None and head_dim % self.group_size:
            raise ValueError(f"group_size={self.group_size} must divide head_dim={head_dim} when axis='token'.")
        if self.axis == "channel" and block_size % self.unit:
            raise ValueError(f"group_size={self.group_size} must divide block_size={block_size} when axis='channel'.")
        super().check(head_dim, block_size)

    @property
    def _num_levels(self) -> int:
        return 2**self.bits - 1 if self.symmetric else 2**self.bits

    @property
    def _group_axis(self) -> int:
        """Axis of a split array along which one group runs."""
        return -1 if self.axis == "token" else -2

    def _split(self, x: jax.Array) -> jax.Array:
        """[*b, S, D] -> [*b, S, D/g, g] per token, [*b, S/g, g, D] per channel."""
        *b, num_tokens, head_dim = x.shape
        if self.axis == "channel":
            return x.reshape(*b, num_tokens // self.unit, self.unit, head_dim)
        group_size = self.group_size or head_dim
        return x.reshape(*b, num_tokens, head_dim // group_size, group_size)

    def _fit(self, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scale and zero point of each group, rounded to the stored dtype, in float32."""
        axis = self._group_axis
        if self.symmetric:
            scale = jnp.abs(groups).max(axis, keepdims=True) / (self._num_levels // 2)
            scale = self._stored(scale)
            return scale, -scale * (self._num_levels // 2)
        low, high = groups.min(axis, keepdims=True), groups.max(axis, keepdims=True)
        return self._stored((high - low) / (self._num_levels - 1)), self._stored(low)

    def _stored(self, x: jax.Array) -> jax.Array:
        largest = float(jnp.finfo(self.metadata_dtype).max)
        return jnp.clip(x, -largest, largest).astype(self.metadata_dtype).astype(jnp.float32)
