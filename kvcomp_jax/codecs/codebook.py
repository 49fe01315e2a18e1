"""Non-uniform quantisation: codes of a few levels anywhere, with a scale a token."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvcomp_jax.codecs.base import Codec
from kvcomp_jax.codecs.contract import dot_scaled, mix_scaled
from kvcomp_jax.codecs.levels import nearest
from kvcomp_jax.codecs.minifloat import inverse, saturated
from kvcomp_jax.types import Constant, pytree, static
from pallas_kernels.codebook_decode.rows import CodebookRows, look_up
from pallas_kernels.finite import check_finite
from pallas_kernels.packing import pack, pack_unit, unpack

BITS = (1, 2, 3, 4)
NORMALISED_BY = {"rms": 1, "range": 2, "none": 0}  # numbers stored a token


class Coded(NamedTuple):
    """Rows as codes of levels; x ~ values[codes] * scale + zero_point."""

    codes: jax.Array  # u32[*b, S * bits // 32, D], see `packing`
    scale: jax.Array | None  # [*b, S]; None when nothing is normalised
    zero_point: jax.Array | None  # as scale, in units of x; None unless normalised by range


@pytree
class Codebook(Codec):
    """Round to the nearest of 2**bits given levels, after each token's row is brought to the levels' units.

    normalise="rms" divides a row by its root mean square, i.e. its norm over sqrt(head_dim); "range" maps its minimum
    and maximum to -1 and 1; "none" leaves it: whoever wraps this codec normalises. Scale and zero point are rounded to
    `metadata_dtype` first (and saturate there) and codes taken with the rounded ones, so the error is at most scale
    times half the largest gap between levels, or the distance to the outermost level. Levels that differ when read,
    e.g. to restore a mean and a variance, are `values`.
    Contractions look up levels alone: scale and zero point are applied to logits and probabilities.
    """

    levels: Constant = static()  # f32[2**bits], ascending: which codes are taken
    values: Constant | None = static(default=None)  # f32[2**bits], what codes are read as; None: the levels
    normalise: Literal["rms", "range", "none"] = static(default="rms")
    metadata_dtype: str = static(default="float16")

    def __post_init__(self) -> None:
        sizes = tuple(2**bits for bits in BITS)
        if self.levels.value.shape not in ((n,) for n in sizes):
            raise ValueError(f"levels {self.levels.value.shape} must be a vector of {sizes} levels.")
        if not (np.isfinite(self.levels.value).all() and (np.diff(self.levels.value) >= 0).all()):
            raise ValueError(f"levels {self.levels.value} must be finite and ascend.")
        if self.values is not None and self.values.value.shape != self.levels.value.shape:
            raise ValueError(f"values {self.values.value.shape} must be as many as levels {self.levels.value.shape}.")
        if self.normalise not in NORMALISED_BY:
            raise ValueError(f"normalise={self.normalise!r} must be one of {', '.join(map(repr, NORMALISED_BY))}.")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.levels.value).bit_length() - 1

    @property
    def unit(self) -> int:
        """Tokens that share words."""
        return pack_unit(self.bits)

    def encode(self, x: jax.Array, pos: jax.Array) -> Coded:
        """Quantise x [*b, S, D]; S a multiple of `unit`. Values must be finite, an error under `checkify`."""
        del pos
        check_finite(x, "Codebook")
        x = x.astype(jnp.float32)
        scale, zero_point = self._fit(x)
        if zero_point is not None:
            x = x - zero_point.astype(jnp.float32)[..., None]
        if scale is not None:
            x = x * inverse(scale.astype(jnp.float32))[..., None]
        return Coded(pack(nearest(x, self.levels.value), self.bits), scale, zero_point)

    def decode(self, enc: Coded, pos: jax.Array) -> jax.Array:
        """Return values[codes] * scale + zero_point, f32[*b, S, D]."""
        del pos
        x = self._values_of(enc)
        if enc.scale is not None:
            x = x * enc.scale.astype(jnp.float32)[..., None]
        return x if enc.zero_point is None else x + enc.zero_point.astype(jnp.float32)[..., None]

    def dot(self, q: jax.Array, enc: Coded, pos: jax.Array) -> jax.Array:
        """q . values[codes], then scaled."""
        del pos
        return dot_scaled(q, self._values_of(enc), enc.scale, enc.zero_point)

    def mix(self, p: jax.Array, enc: Coded, pos: jax.Array) -> jax.Array:
        """Scaled p . values[codes]."""
        del pos
        return mix_scaled(p, self._values_of(enc), enc.scale, enc.zero_point)

    def codebook_rows(self, enc: Coded) -> CodebookRows | None:
        """Codes with their levels, and what is stored a token; no kernel reads 1 bit."""
        if self.bits == 1:
            return None
        return CodebookRows(enc.codes, self._read_as, scale=enc.scale, zero_point=enc.zero_point)

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of the codes and the metadata; `num_tokens` counts in whole units. The levels are the program's."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return num_tokens * head_dim * self.bits + self.metadata_bits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of scales and zero points."""
        del head_dim
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return num_tokens * jnp.dtype(self.metadata_dtype).itemsize * 8 * NORMALISED_BY[self.normalise]

    def _values_of(self, enc: Coded) -> jax.Array:
        return look_up(unpack(enc.codes, self.bits), self._read_as)

    @property
    def _read_as(self) -> np.ndarray:
        """What codes stand for, f32[2**bits]."""
        return np.asarray((self.values or self.levels).value, np.float32)

    def _fit(self, x: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """Scale and zero point [*b, S] of rows f32[*b, S, D], as stored."""
        if self.normalise == "none":
            return None, None
        if self.normalise == "rms":
            return self._stored(jnp.sqrt(jnp.square(x).mean(-1))), None
        low, high = x.min(-1), x.max(-1)
        return self._stored(high * 0.5 - low * 0.5), self._stored(high * 0.5 + low * 0.5)

    def _stored(self, x: jax.Array) -> jax.Array:
        return saturated(x, self.metadata_dtype)
