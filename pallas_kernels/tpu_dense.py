"""Dense keys or values of one block in a TPU kernel: rows lie as XLA stores them, and both products take them so."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized_decode.tpu_side import block_spec, dot
from pallas_kernels.tpu_rows import LANES, repeat_lanes, tokens_along_lanes


@dataclasses.dataclass(frozen=True)
class Dense:
    """See `tpu_decode.Side`."""

    dim: int
    block: int
    tile: int
    places: int = 1  # tokens are in order

    @property
    def transposed(self) -> bool:
        """Whether arrays come with tokens along lanes."""
        return tokens_along_lanes(self.dim)

    def arrays(self, x: jax.Array) -> jax.Array:
        """See `tpu_decode.Side`."""
        return x.swapaxes(-1, -2) if self.transposed else x

    def specs(self, x: jax.Array, block_of) -> pl.BlockSpec:
        """See `tpu_decode.Side`."""
        shape = (self.dim, self.block) if self.transposed else (self.block, self.dim)
        return block_spec(shape, self.transposed, block_of)

    def scratch(self, num_queries: int = 0) -> None:
        """Nothing is kept for a block."""

    def prepare(self, x: Any, scratch: None, live: jax.Array, q: Any = None) -> None:
        """Nothing is made ready."""

    def read(self, x: Any, scratch: None, i: jax.Array, live: jax.Array, dtype: Any) -> "DenseTile":
        """See `tpu_decode.Side`."""
        tokens = pl.ds(pl.multiple_of(i * self.tile, LANES), self.tile)
        return DenseTile(self, x[:, tokens] if self.transposed else x[tokens, :], live - i * self.tile, dtype)

    def zero_mix(self, num_rows: int) -> tuple[jax.Array, ...]:
        """See `tpu_decode.Side`."""
        return (jnp.zeros((num_rows, self.dim), jnp.float32),)

    def finish_mix(self, sums: tuple[jax.Array, ...], num_rows: int) -> jax.Array:
        """See `tpu_decode.Side`."""
        del num_rows
        return sums[0]


@dataclasses.dataclass(frozen=True)
class DenseTile:
    """Consecutive tokens at work."""

    side: Dense
    rows: jax.Array  # [T, D] or [D, T]
    live: jax.Array  # how many count; beyond there may be anything
    dtype: Any

    def dot(self, q: jax.Array) -> jax.Array:
        """See `tpu_decode.Tile`."""
        return dot(q.astype(self.dtype), self.rows.astype(self.dtype), 0 if self.side.transposed else 1)

    def mix(self, keep: jax.Array, sums: tuple[jax.Array, ...], p: jax.Array) -> tuple[jax.Array, ...]:
        """See `tpu_decode.Tile`."""
        rows = self._cleared().astype(self.dtype)
        products = dot(p.astype(self.dtype), rows, 1 if self.side.transposed else 0)
        return (sums[0] * repeat_lanes(keep, self.side.dim) + products,)

    def _cleared(self) -> jax.Array:
        """Rows with zeros for tokens that do not count, one instruction a register of whatever type."""
        words, axis = pltpu.bitcast(self.rows, jnp.uint32), 1 if self.side.transposed else 0
        together = self.rows.shape[axis] // words.shape[axis]  # tokens of a word
        first = lax.broadcasted_iota(jnp.int32, words.shape, axis) * together
        keep = jnp.where(first < self.live, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
        if together == 2:
            keep = jnp.where(first + 1 == self.live, jnp.uint32(0xFFFF), keep)  # the first is the lower half
        return pltpu.bitcast(words & keep, self.rows.dtype)
