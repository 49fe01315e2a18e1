"""Rows as floats of one byte."""

from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.base import Codec
from kvcomp_jax.codecs.contract import dot_scaled, mix_scaled
from kvcomp_jax.codecs.minifloat import FLOAT8, Float8Format, float8_max, from_minifloat, inverse, saturated, to_float8
from kvcomp_jax.types import pytree, static
from pallas_kernels.finite import check_finite


class Floats(NamedTuple):
    """Rows as small floats; x ~ codes * scale."""

    codes: jax.Array  # u8[*b, S, D], bits of the floats
    scale: jax.Array | None  # [*b, S]; None where all tokens share one


@pytree
class Float8(Codec):
    """Store each value as an FP8 number times a scale: one for all, e.g. from calibration, or one a token.

    Rounds to nearest even; what lies beyond the format's largest number (448 or 57344 scales) becomes that number. A
    scale a token brings the row's largest value to it.
    Source: Micikevicius et al. 2022, arXiv:2209.05433.
    """

    format: Float8Format = static(default="e4m3")
    scale: float | Literal["token"] = static(default=1.0)
    metadata_dtype: str = static(default="float32")

    def __post_init__(self) -> None:
        if self.format not in FLOAT8:
            raise ValueError(f"format={self.format!r} must be one of {', '.join(FLOAT8)}.")
        check_scale(self.scale)

    @property
    def unit(self) -> int:
        """1: every token stands alone."""
        return 1

    def encode(self, x: jax.Array, pos: jax.Array) -> Floats:
        """Round x [*b, S, D]. Values must be finite, an error under `checkify`."""
        del pos
        check_finite(x, "Float8")
        x = x.astype(jnp.float32)
        if isinstance(self.scale, float):
            return Floats(to_float8(x * (1 / self.scale), self.format), None)
        scale = saturated(jnp.abs(x).max(-1) * (1 / float8_max(self.format)), self.metadata_dtype)
        return Floats(to_float8(x * inverse(scale.astype(jnp.float32))[..., None], self.format), scale)

    def decode(self, enc: Floats, pos: jax.Array) -> jax.Array:
        """Return the floats times their scale, f32[*b, S, D]."""
        del pos
        values = from_minifloat(enc.codes, self.format)
        return values * (cast(float, self.scale) if enc.scale is None else enc.scale.astype(jnp.float32)[..., None])

    def dot(self, q: jax.Array, enc: Floats, pos: jax.Array) -> jax.Array:
        """q . floats, then scaled."""
        del pos
        return dot_scaled(q, from_minifloat(enc.codes, self.format), self._scale_of(enc))

    def mix(self, p: jax.Array, enc: Floats, pos: jax.Array) -> jax.Array:
        """Scaled p . floats."""
        del pos
        return mix_scaled(p, from_minifloat(enc.codes, self.format), self._scale_of(enc))

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """8 bits a value, and the scales."""
        return num_tokens * head_dim * 8 + self.metadata_bits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of the scales of tokens."""
        del head_dim
        return scale_bits(self.scale, self.metadata_dtype, num_tokens)

    def _scale_of(self, enc: Floats) -> jax.Array | float | None:
        return cast(Any, self.scale) if enc.scale is None else enc.scale


def check_scale(scale: float | str) -> None:
    """Raise ValueError unless scale is a positive number or "token"."""
    if scale != "token" and not (isinstance(scale, float) and 0 < scale < float("inf")):
        raise ValueError(f"scale={scale!r} must be a positive float for all tokens, or 'token' for one each.")


def scale_bits(scale: float | str, metadata_dtype: str, num_tokens: int) -> int:
    """Bits of scales: none for one that all tokens share, which is the program's."""
    return num_tokens * jnp.dtype(metadata_dtype).itemsize * 8 if scale == "token" else 0
