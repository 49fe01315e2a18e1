"""Quantisation by a step of known size: what entropy coding wants once errors of all channels weigh alike."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.integer import IntegerCodec
from kvcomp_jax.types import pytree, static
from pallas_kernels.entropy_decode.rows import dequantize
from pallas_kernels.finite import check_finite
from pallas_kernels.packing import BITS, pack, pack_unit, unpack


class Regions(NamedTuple):
    """Each region's step, and the code that stands for zero."""

    scale: jax.Array  # f16[*b, S / group_size, 1]
    zero: jax.Array  # u8, as scale


class SteppedRows(NamedTuple):
    """Plainly packed codes and their regions."""

    codes: jax.Array
    regions: Regions


@pytree
class Stepped(IntegerCodec):
    """Round to multiples of `step`, in the units that rows arrive in: no value is off by more than half of it.

    Zero is the middle code wherever it can be, so that a code means the same in every region, and how frequent it is
    can be learnt. A region, `group_size` tokens and all channels, that reaches beyond the codes takes a wider step.
    At a given entropy a uniform step loses least where all errors weigh alike, whatever the channels' ranges are: wrap
    in `PerChannel` to weigh them, and in `Entropy`, since plainly packed most codes would be idle.
    Source: Gish and Pierce 1968, IEEE Trans. Inf. Theory 14(5).
    """

    step: float = static()
    num_levels: int = static(default=128)
    group_size: int = static(default=64)

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise ValueError(f"step={self.step} must be positive.")
        if not 4 <= self.num_levels <= 256:
            raise ValueError(f"num_levels={self.num_levels} must be in 4 .. 256, as codes are bytes.")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1 token.")

    @property
    def region(self) -> int:
        """Tokens that share a step."""
        return self.group_size

    @property
    def unit(self) -> int:
        """Tokens that share a word or a step."""
        return math.lcm(self.group_size, pack_unit(self._width))

    @property
    def _width(self) -> int:
        return next(bits for bits in BITS if 2**bits >= self.num_levels)

    def stretch_for(self, num_levels: int) -> float:
        """As many times wider as there are fewer codes."""
        return max(self.num_levels / num_levels, 1.0)

    def quantise(self, x: jax.Array, stretch: jax.Array | float = 1.0) -> tuple[jax.Array, Regions]:
        """See `IntegerCodec`."""
        groups = x.astype(jnp.float32).reshape(*x.shape[:-2], -1, self.group_size * x.shape[-1])
        count = jnp.floor(self.num_levels / jnp.float32(stretch) + 1e-3)
        zero = jnp.floor(count / 2)
        reach = jnp.maximum(groups.max(-1) / (count - zero - 1), -groups.min(-1) / zero)
        scale = _rounded_up(jnp.maximum(reach, stretch * self.step))[..., None]
        codes = jnp.clip(jnp.round(groups / scale.astype(jnp.float32)) + zero, 0, count - 1)
        regions = Regions(scale, jnp.broadcast_to(zero, scale.shape).astype(jnp.uint8))
        return codes.astype(jnp.uint8).reshape(x.shape), regions

    def grid(self, metadata: Regions) -> tuple[jax.Array, jax.Array]:
        """See `IntegerCodec`."""
        scale = metadata.scale.astype(jnp.float32)
        return scale, -metadata.zero.astype(jnp.float32) * scale

    def encode(self, x: jax.Array, pos: jax.Array) -> SteppedRows:
        """Quantise finite x [*b, S, D] and pack the codes in 2, 3, 4 or 8 bits, whichever they fit in."""
        del pos
        check_finite(x, "Stepped")
        codes, regions = self.quantise(x)
        return SteppedRows(pack(codes, self._width), regions)

    def decode(self, enc: SteppedRows, pos: jax.Array) -> jax.Array:
        """Return (codes - zero) * scale, f32[*b, S, D]."""
        del pos
        return dequantize(unpack(enc.codes, self._width), *self.grid(enc.regions))

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of packed codes and regions; `num_tokens` counts in whole units."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return num_tokens * head_dim * self._width + self.metadata_bits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """24 a region; `num_tokens` counts in whole regions."""
        del head_dim
        return -(-num_tokens // self.group_size) * 24


def _rounded_up(x: jax.Array) -> jax.Array:
    """The smallest normal float16 that is at least x >= 0, or the largest one there is."""
    info = jnp.finfo(jnp.float16)
    near = jnp.clip(x, float(info.tiny), float(info.max)).astype(jnp.float16)
    above = jnp.minimum(near.astype(jnp.float32) * (1 + 2**-10), float(info.max)).astype(jnp.float16)
    return jnp.where(near.astype(jnp.float32) < x, above, near)
