"""Rows as floats of four bits in blocks that share a small float as scale."""

from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.base import Codec
from kvcomp_jax.codecs.contract import dot_scaled, mix_scaled
from kvcomp_jax.codecs.float8 import check_scale, scale_bits
from kvcomp_jax.codecs.minifloat import (
    E2M1_MAX,
    float8_max,
    from_e8m0,
    from_minifloat,
    inverse,
    saturated,
    to_e2m1,
    to_e8m0,
    to_float8,
)
from kvcomp_jax.types import pytree, static
from pallas_kernels.finite import check_finite
from pallas_kernels.packing import pack, pack_unit, unpack

BLOCK_SCALES = ("e4m3", "e8m0")
_E2M1_TOP_EXPONENT = 2  # 6 = 1.5 * 2**2


class Blocks(NamedTuple):
    """Rows as codes in blocks; x ~ codes * block_scale * scale."""

    codes: jax.Array  # u32[*b, S * 4 // 32, D], see `packing`
    block_scale: jax.Array  # u8[*b, S, D // group_size], bits of a small float
    scale: jax.Array | None  # [*b, S]; None where all tokens share one


@pytree
class Float4(Codec):
    """Store each value as an e2m1 number (0, 0.5, 1, 1.5, 2, 3, 4, 6 and sign) times its block's scale.

    A block is `group_size` channels of one token. block_scale="e4m3" brings a block's largest value to 6, as well as an
    FP8 number can, times a scale in f32 that brings the largest block scale to 448: one a token here, so that tokens
    stand alone, or one number for all. block_scale="e8m0" is the power of two that puts a block's largest value
    between 4 and 8 (beyond 6 it saturates); it reaches far enough alone, so `scale` is then a number, by default 1.
    Sources: NVFP4 (NVIDIA Technical Blog, "Introducing NVFP4", June 2025) has blocks of 16 and e4m3; MXFP4 (OCP
    Microscaling Formats 1.0, 2023; Rouhani et al. 2023, arXiv:2310.10537, algorithm 1) blocks of 32 and e8m0.
    """

    group_size: int = static()
    block_scale: Literal["e4m3", "e8m0"] = static()
    scale: float | Literal["token"] = static(default=1.0)
    metadata_dtype: str = static(default="float32")

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1.")
        if self.block_scale not in BLOCK_SCALES:
            raise ValueError(f"block_scale={self.block_scale!r} must be one of {', '.join(BLOCK_SCALES)}.")
        check_scale(self.scale)
        if self.block_scale == "e8m0" and self.scale == "token":
            raise ValueError("scale='token' is for block_scale='e4m3'; e8m0 covers every magnitude, pass a number.")

    @property
    def unit(self) -> int:
        """Tokens that share words."""
        return pack_unit(4)

    def encode(self, x: jax.Array, pos: jax.Array) -> Blocks:
        """Round x [*b, S, D]; S a multiple of `unit`. Values must be finite, an error under `checkify`."""
        del pos
        check_finite(x, "Float4")
        groups = self._split(x.astype(jnp.float32))  # [*b, S, N, g]
        largest = jnp.abs(groups).max(-1)  # [*b, S, N]
        if isinstance(self.scale, float):
            kept, scale = None, jnp.float32(self.scale)
        else:
            kept = saturated(largest.max(-1) * (1 / (E2M1_MAX * float8_max("e4m3"))), self.metadata_dtype)
            scale = kept.astype(jnp.float32)[..., None]
        block_scale = self._fit(largest * inverse(scale))
        codes = to_e2m1(groups * inverse(self._block_scales(block_scale) * scale)[..., None])
        return Blocks(pack(codes.reshape(x.shape), 4), block_scale, kept)

    def decode(self, enc: Blocks, pos: jax.Array) -> jax.Array:
        """Return codes times block scale times scale, f32[*b, S, D]."""
        del pos
        scale = cast(float, self.scale) if enc.scale is None else enc.scale.astype(jnp.float32)[..., None]
        return self._values_of(enc) * scale

    def dot(self, q: jax.Array, enc: Blocks, pos: jax.Array) -> jax.Array:
        """q . (codes * block scale), then scaled."""
        del pos
        return dot_scaled(q, self._values_of(enc), self._scale_of(enc))

    def mix(self, p: jax.Array, enc: Blocks, pos: jax.Array) -> jax.Array:
        """Scaled p . (codes * block scale)."""
        del pos
        return mix_scaled(p, self._values_of(enc), self._scale_of(enc))

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """4 bits a value, and the scales; `num_tokens` counts in whole units."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return num_tokens * head_dim * 4 + self.metadata_bits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of the scales of blocks and tokens."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return num_tokens * head_dim // self.group_size * 8 + scale_bits(self.scale, self.metadata_dtype, num_tokens)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if blocks do not divide a row."""
        if head_dim % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} must divide head_dim={head_dim}; pass one that does, or use "
                "another codec, e.g. Float8."
            )
        super().check(head_dim, block_size)

    def _fit(self, largest: jax.Array) -> jax.Array:
        """Block scales u8 for the largest values f32 of blocks."""
        if self.block_scale == "e4m3":
            return to_float8(largest * (1 / E2M1_MAX), "e4m3")
        return to_e8m0(largest * 2.0**-_E2M1_TOP_EXPONENT)

    def _block_scales(self, bits: jax.Array) -> jax.Array:
        return from_minifloat(bits, "e4m3") if self.block_scale == "e4m3" else from_e8m0(bits)

    def _values_of(self, enc: Blocks) -> jax.Array:
        values = from_minifloat(unpack(enc.codes, 4), "e2m1")
        return (self._split(values) * self._block_scales(enc.block_scale)[..., None]).reshape(values.shape)

    def _scale_of(self, enc: Blocks) -> jax.Array | float | None:
        return cast(Any, self.scale) if enc.scale is None else enc.scale

    def _split(self, x: jax.Array) -> jax.Array:
        """[*b, S, D] -> [*b, S, D // group_size, group_size]."""
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.group_size, self.group_size)
