"""Uniform quantisation: codes, a scale and a zero point a group."""

from typing import Literal

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs import dither
from kvcomp_jax.codecs.integer import IntegerCodec
from kvcomp_jax.types import pytree, static
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.packing import BITS, pack_unit
from pallas_kernels.quantize_pack import dequantize, quantize_pack
from pallas_kernels.quantize_pack.reference import round_to

AXES = ("token", "channel")
ROUNDINGS = ("nearest", "stochastic")


@pytree
class Affine(IntegerCodec):
    """Round to one of 2**bits evenly spaced levels between a group's minimum and maximum, by default the nearest.

    axis="token" groups `group_size` channels of one token (None: the whole head), axis="channel" groups `group_size`
    consecutive tokens of one channel. Symmetric uses 2**bits - 1 levels around zero and stores no zero point.
    Scale and zero point are rounded to `metadata_dtype` first and the codes taken with the rounded ones, so the
    error is at most scale / 2 beyond that rounding; metadata saturates at that dtype's largest value. Constant groups
    get code 0 and come back as their minimum. Scales and codes are products with rounded reciprocals, so that they are
    the same however they are compiled, and within float32 rounding of a tie a quotient may give the other code.
    clip < 1 multiplies both ends of a group's range and so suits rows around zero, rotated ones above all: fewer wasted
    levels for a few elements that are cut off. The bound on the error then holds for elements within the range.
    Stochastic rounding picks the level above or below so that the expected value is exact; its error is below one
    scale. It draws from a hash of `seed`, a token's position and the channel.
    Source: KIVI, Liu et al. 2024, arXiv:2402.02750, equations 1-2; symmetric as in MaxText's quantised cache;
    clip as in QuaRot, Ashkboos et al. 2024, arXiv:2404.00456.
    """

    bits: int = static()
    axis: Literal["token", "channel"] = static()
    group_size: int | None = static(default=None)
    symmetric: bool = static(default=False)
    metadata_dtype: str = static(default="float16")
    clip: float = static(default=1.0)
    rounding: Literal["nearest", "stochastic"] = static(default="nearest")
    seed: int = static(default=0)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} must be one of {', '.join(map(str, BITS))}.")
        if self.axis not in AXES:
            raise ValueError(f"axis={self.axis!r} must be 'token' or 'channel'.")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding={self.rounding!r} must be 'nearest' or 'stochastic'.")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1.")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip={self.clip} must be in (0, 1]; 1 cuts nothing off.")
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

    def format(self, head_dim: int) -> Format:
        """What the arrays of an encoding of rows of `head_dim` mean."""
        size = self.group_size or head_dim
        return Format(self.bits, self.axis, size, self.symmetric, self.metadata_dtype, self.clip)

    def encode(self, x: jax.Array, pos: jax.Array) -> Quantized:
        """Quantise x [*b, S, D]; S a multiple of `unit`."""
        noise = None if self.rounding == "nearest" else dither.uniform(pos, x.shape[-1], self.seed)
        return quantize_pack(x, self.format(x.shape[-1]), dither=noise)

    def decode(self, enc: Quantized, pos: jax.Array) -> jax.Array:
        """Return codes * scale + zero_point, f32[*b, S, D]."""
        del pos
        return dequantize(enc, self.format(enc.codes.shape[-1]))

    @property
    def num_levels(self) -> int:
        """2**bits, one less when symmetric."""
        return self.format(1).num_levels

    @property
    def region(self) -> int:
        """Tokens that share a scale."""
        return (self.group_size or 1) if self.axis == "channel" else 1

    def stretch_for(self, num_levels: int) -> float:
        """The stretch at which a range has `num_levels` levels."""
        if num_levels >= self.num_levels:
            return 1.0
        if self.symmetric:
            raise ValueError("symmetric codes are centred and cannot be coarsened; use symmetric=False.")
        return (self.num_levels - 1) / (num_levels - 1)

    def quantise(self, x: jax.Array, stretch: jax.Array | float = 1.0) -> tuple[jax.Array, tuple]:
        """Codes u8[*b, S, D], and (scale, zero_point) as stored."""
        if self.rounding != "nearest":
            raise ValueError(f"rounding={self.rounding!r} cannot be coded further; use rounding='nearest'.")
        codes, scale, zero_point = round_to(x, self.format(x.shape[-1]), stretch)
        return codes, (scale, zero_point)

    def grid(self, metadata: tuple) -> tuple[jax.Array, jax.Array]:
        """Scale and zero point, f32[*b, rows, cols]."""
        scale, zero_point = metadata
        if zero_point is None:
            return scale.astype(jnp.float32), -scale.astype(jnp.float32) * (self.num_levels // 2)
        return scale.astype(jnp.float32), zero_point.astype(jnp.float32)

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
