"""Codes of variable length in slots of fixed size: what both entropy coding and packing by width need."""

import abc
import math

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.codecs.base import Codec, Encoded
from kvcomp_jax.codecs.integer import IntegerCodec
from kvcomp_jax.types import pytree, static
from pallas_kernels.finite import check_finite


@pytree
class Budgeted(Codec):
    """Store the codes of `inner` in slots of `budget` bits a value, one for each unit of `block` tokens.

    Static shapes must say beforehand what data decide, and no lossless code shrinks everything. So a unit takes the
    finest step that fits its slot: the inner codec's own, else one `ratio` times as wide, and so on, and last one
    so wide that plain packing fits whatever the data: nothing is ever lost, and a unit that is hard to compress is
    rounded more coarsely instead. `budget=None` gives slots of plain packing, where the inner codec's own step always
    fits.
    Slots instead of a pool: within a KV head of a small Llama, units of 64 tokens differ in size by 0.1 bits a value
    (one standard deviation) or less, and the fullest head of a layer takes about 0.1 more than their mean, so a pool,
    which would tie units together in memory and in time, saves little.
    """

    inner: IntegerCodec
    budget: float | None = static(default=None)
    block: int = static(default=64)
    ratio: float = static(default=1.15)  # between steps that are tried, at most: 0.2 bits a value

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Codec):
            return  # rebuilt by a tree operation
        if not isinstance(self.inner, IntegerCodec):
            raise TypeError(f"{type(self).__name__} needs an inner codec with integer codes, got {self.inner}.")
        if self.block < 1 or self.block % self.inner.region:
            raise ValueError(f"block={self.block} must be a multiple of {self.inner.region}, tokens that share a step.")
        if self.budget is not None and self.budget < 2:
            raise ValueError(f"budget={self.budget} must be None or at least 2 bits a value.")
        if not self.ratio > 1:
            raise ValueError(f"ratio={self.ratio} must exceed 1: steps that are tried grow.")
        self.inner.stretch_for(2 ** self.inner.plain_bits(self.budget))  # raises if it cannot be coarsened

    @property
    def unit(self) -> int:
        """Tokens of a slot."""
        return self.block

    @property
    def stretches(self) -> tuple[float, ...]:
        """How much wider than the inner codec's the steps are that a unit may take, finest first."""
        widest = self.inner.stretch_for(2 ** self.inner.plain_bits(self.budget))
        count = math.ceil(math.log(widest) / math.log(self.ratio))
        return tuple(widest ** (j / max(count, 1)) for j in range(count + 1))

    def fitting(self, x: jax.Array, room: int, cost) -> tuple[jax.Array, Encoded, jax.Array]:
        """Quantise each unit of x [*b, S, D] as finely as it fits.

        Args:
          room: What a unit may cost.
          cost: (codes u8[*b, S, D], j) -> i32[*b, units], with the j-th of `stretches`.

        Returns:
          Codes, metadata, and which stretch each unit took, u8[*b, units]; one beyond the last is the last one's codes,
          to be packed plainly.
        """
        check_finite(x, type(self).__name__)
        stretches = jnp.array(self.stretches, jnp.float32)
        count = len(self.stretches)
        codes, metadata = self.inner.quantise(x, stretches[-1])
        choice = jnp.full((*x.shape[:-2], x.shape[-2] // self.block), count, jnp.uint8)

        def finer(i: jax.Array, best: tuple) -> tuple:
            j = count - 1 - i
            codes, metadata = self.inner.quantise(x, stretches[j])
            fits = cost(codes, j) <= room

            def pick(new: jax.Array, old: jax.Array) -> jax.Array:
                mask = jnp.repeat(fits, new.shape[fits.ndim - 1] // fits.shape[-1], -1)
                return jnp.where(mask.reshape(*mask.shape, *(1,) * (new.ndim - mask.ndim)), new, old)

            return jax.tree.map(pick, (codes, metadata, jnp.full_like(best[2], j)), best)

        return lax.fori_loop(0, count, finer, (codes, metadata, choice))

    @abc.abstractmethod
    def slot_bits(self, head_dim: int) -> int:
        """Bits of a unit's slot."""

    @abc.abstractmethod
    def head_bits(self, head_dim: int) -> int:
        """Bits of what a unit stores beside its slot and the inner codec's metadata."""

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of slots, full or not, and of all metadata; `num_tokens` counts in whole units."""
        units = -(-num_tokens // self.block)
        return units * self.slot_bits(head_dim) + self.metadata_bits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of steps and of what says how a slot is read."""
        units = -(-num_tokens // self.block)
        return units * self.head_bits(head_dim) + self.inner.metadata_bits(units * self.block, head_dim)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if the inner codec cannot take such rows, or units do not divide blocks."""
        self.inner.check(head_dim, math.lcm(self.block, self.inner.unit))
        super().check(head_dim, block_size)
