"""Error-bounded quantisation: the step is a fixed fraction of a region's range."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.integer import IntegerCodec
from kvcomp_jax.types import pytree, static
from pallas_kernels.entropy_decode.rows import dequantize
from pallas_kernels.finite import check_finite
from pallas_kernels.packing import BITS, pack, pack_unit, unpack

AXES = ("block", "token", "channel")
_MAX_ZERO = {"int8": 126, "int16": 32000}  # so that rounding of the step cannot carry zero bins out of range


class Steps(NamedTuple):
    """A region's step and which multiple of it code 0 stands for."""

    scale: jax.Array  # [*b, rows, cols]
    zero: jax.Array  # i8 or i16, as scale


class BoundedRows(NamedTuple):
    """Plainly packed codes and their steps."""

    codes: jax.Array
    steps: Steps


@pytree
class Bounded(IntegerCodec):
    """Round to multiples of `rel_scale` times the range of a region: no value is off by more than half such a step.

    axis="token": a region is a token's channels in one KV head; "channel": `group_size` tokens of one channel; "block":
    `group_size` tokens and all channels. Multiples count from zero, so that the step alone defines the values:
    x ~ (code + zero) * scale, with the step as rounded to `metadata_dtype` both ways. The step is at least that
    dtype's smallest normal number, and at least |minimum| / 126 of its region, or / 32000 with zero_dtype="int16", so
    that `zero` fits: regions far from zero need the latter. 1 / rel_scale + 2 levels.
    Source: KVComp, arXiv:2509.00579, and PackKV, arXiv:2512.24449; regions there span all heads, here one, as heads may
    be sharded and may keep different tokens.
    """

    rel_scale: float = static()
    axis: Literal["block", "token", "channel"] = static()
    group_size: int | None = static(default=None)
    metadata_dtype: str = static(default="float16")
    zero_dtype: Literal["int8", "int16"] = static(default="int16")

    def __post_init__(self) -> None:
        if not 1 / 254 <= self.rel_scale <= 1:
            raise ValueError(f"rel_scale={self.rel_scale} must be in [1/254, 1], as codes are bytes.")
        if self.axis not in AXES:
            raise ValueError(f"axis={self.axis!r} must be 'block', 'token' or 'channel'.")
        if self.zero_dtype not in _MAX_ZERO:
            raise ValueError(f"zero_dtype={self.zero_dtype!r} must be 'int8' or 'int16'.")
        if (self.group_size is None) != (self.axis == "token"):
            raise ValueError(
                f"group_size={self.group_size} must be tokens, e.g. 64, for axis='block' or 'channel', and None for "
                f"'token'; got axis={self.axis!r}."
            )

    @property
    def num_levels(self) -> int:
        """Codes 0 .. ceil(1 / rel_scale) + 1: both ends of the range are rounded."""
        return math.ceil(1 / self.rel_scale - 1e-9) + 2

    @property
    def region(self) -> int:
        """Tokens that share a step."""
        return self.group_size or 1

    @property
    def unit(self) -> int:
        """Tokens that share a word or a step."""
        return math.lcm(self.region, pack_unit(self._width))

    @property
    def _width(self) -> int:
        return next(bits for bits in BITS if 2**bits >= self.num_levels)

    def stretch_for(self, num_levels: int) -> float:
        """The stretch at which ceil(1 / (stretch * rel_scale)) + 2 codes remain."""
        if num_levels < 3:
            raise ValueError(f"num_levels={num_levels} must be at least 3 for a bounded codec; give it 2 bits.")
        return max(1 / (self.rel_scale * (num_levels - 2)), 1.0)

    def quantise(self, x: jax.Array, stretch: jax.Array | float = 1.0) -> tuple[jax.Array, Steps]:
        """See `IntegerCodec`."""
        groups = self._split(x.astype(jnp.float32))
        along = {"token": (-1,), "channel": (-2,), "block": (-1, -2)}[self.axis]
        low, high = groups.min(along, keepdims=True), groups.max(along, keepdims=True)
        info = jnp.finfo(self.metadata_dtype)
        step = jnp.maximum(stretch * self.rel_scale * (high - low), jnp.abs(low) * (1 / _MAX_ZERO[self.zero_dtype]))
        stored = jnp.clip(step, float(info.tiny), float(info.max)).astype(self.metadata_dtype)
        inverse = 1 / stored.astype(jnp.float32)
        limits = jnp.iinfo(self.zero_dtype)
        zero = jnp.clip(jnp.round(low * inverse), limits.min, limits.max)
        codes = jnp.clip(jnp.round(groups * inverse) - zero, 0, self.num_levels - 1)
        steps = Steps(self._small(stored), self._small(zero.astype(self.zero_dtype)))
        return codes.astype(jnp.uint8).reshape(x.shape), steps

    def grid(self, metadata: Steps) -> tuple[jax.Array, jax.Array]:
        """See `IntegerCodec`."""
        scale = metadata.scale.astype(jnp.float32)
        return scale, metadata.zero.astype(jnp.float32) * scale

    def encode(self, x: jax.Array, pos: jax.Array) -> BoundedRows:
        """Quantise finite x [*b, S, D] and pack the codes in 2, 3, 4 or 8 bits, whichever they fit in."""
        del pos
        check_finite(x, "Bounded")
        codes, steps = self.quantise(x)
        return BoundedRows(pack(codes, self._width), steps)

    def decode(self, enc: BoundedRows, pos: jax.Array) -> jax.Array:
        """Return (codes + zero) * scale, f32[*b, S, D]."""
        del pos
        return dequantize(unpack(enc.codes, self._width), *self.grid(enc.steps))

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of packed codes and steps; `num_tokens` counts in whole units."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return num_tokens * head_dim * self._width + self.metadata_bits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of steps and zero bins; `num_tokens` counts in whole regions."""
        regions = -(-num_tokens // self.region) * (head_dim if self.axis == "channel" else 1)
        return regions * 8 * (jnp.dtype(self.metadata_dtype).itemsize + jnp.dtype(self.zero_dtype).itemsize)

    def _split(self, x: jax.Array) -> jax.Array:
        """[*b, S, D] -> [*b, S / region, region, D], or as it is per token."""
        if self.axis == "token":
            return x
        return x.reshape(*x.shape[:-2], x.shape[-2] // self.region, self.region, x.shape[-1])

    def _small(self, x: jax.Array) -> jax.Array:
        """A value a region -> [*b, rows, cols]."""
        return x if self.axis == "token" else x.squeeze(-2)
