"""Codecs whose rows are small integers on a grid: what entropy coding and packing by width can store more tightly."""

import abc

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.base import Codec, Encoded


class IntegerCodec(Codec):
    """A codec that rounds to codes 0 .. num_levels - 1 with x ~ codes * scale + zero_point.

    Codes of uneven levels (`Codebook`) are none: what does not fit a slot takes a wider step, which levels do not have.
    """

    @property
    @abc.abstractmethod
    def num_levels(self) -> int:
        """Distinct codes, at most 256."""

    @property
    @abc.abstractmethod
    def region(self) -> int:
        """Tokens that must be quantised together; 1 where every token has its own scales."""

    @abc.abstractmethod
    def quantise(self, x: jax.Array, stretch: jax.Array | float) -> tuple[jax.Array, Encoded]:
        """Round x [*b, S, D] to codes u8[*b, S, D], with steps `stretch` >= 1 times as wide as the codec's own.

        Returns:
          The codes, and the metadata as stored: arrays [*b, rows, ...] with rows proportional to tokens.
        """

    @abc.abstractmethod
    def grid(self, metadata: Encoded) -> tuple[jax.Array, jax.Array]:
        """Return (scale, zero_point) f32[*b, rows, cols], rows dividing the tokens and cols the channels."""

    @abc.abstractmethod
    def stretch_for(self, num_levels: int) -> float:
        """The stretch from which on `quantise` gives codes below `num_levels` alone; 1 if it always does."""

    def code_bits(self) -> int:
        """Bits of a code in plain packing."""
        return max((self.num_levels - 1).bit_length(), 1)

    def plain_bits(self, budget: float | None) -> int:
        """Bits of a code that always fit in `budget` bits a value; None is as many as a code has."""
        return self.code_bits() if budget is None else min(int(budget), self.code_bits())


def bell(levels: jax.Array, num_symbols: int) -> jax.Array:
    """Weights i32[n, num_symbols] of codes of normal rows whose range, of i32[n] levels, is eight deviations."""
    symbol = jnp.arange(num_symbols)[None]
    at = (symbol + 0.5) / levels[:, None] - 0.5
    return jnp.where(symbol < levels[:, None], 1 + (1000 * jnp.exp(-0.5 * (8 * at) ** 2)).astype(jnp.int32), 0)
