"""Keys and values of the TPU kernel whose codes enter the matrix unit as int8, and what corrects for their offsets."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import Quantized
from pallas_kernels.homomorphic_decode.partitions import block_diagonal, centre, split, step_to_int8, to_int8
from pallas_kernels.quantized_decode.tpu_side import Scratch, Side
from pallas_kernels.tpu_rows import LANES, int8_codes, repeat_lanes, tokens_of_lanes


class Summed(NamedTuple):
    """Quantised rows and the sums of their codes, in memory or in a block."""

    rows: Quantized
    sums: jax.Array  # shaped as scales


class Queries(NamedTuple):
    """Queries in 8 bits a partition; partitions come after one another as rows, every lane of a number is equal."""

    codes: jax.Array  # i8[B, K, G * R, D], zero outside a row's partition
    scale: jax.Array  # f32[B, K, G * R, 128]
    offset: jax.Array
    whole: jax.Array  # sum of what a partition stands for: what a key's offset is multiplied by


class IntegerScratch(NamedTuple):
    """Parts of a block of values that are made ready once for all its tiles."""

    rows: Scratch
    sums: jax.Array  # f32[P / g, D]


def queries(q: jax.Array, group_size: int) -> Queries:
    """Round q f32[B, K, R, D]."""
    codes, scale, offset = to_int8(split(q, group_size))
    whole = scale * codes.astype(jnp.int32).sum(-1, keepdims=True).astype(jnp.float32) + offset * group_size
    lanes = (jnp.broadcast_to(x, (*x.shape[:-1], LANES)) for x in (scale, offset, whole))
    return Queries(block_diagonal(codes), *(x.reshape(*x.shape[:2], -1, LANES) for x in lanes))


@dataclasses.dataclass(frozen=True)
class _Integers(Side):
    """Rows whose codes are multiplied as int8."""

    @property
    def places(self) -> int:
        """See `tpu_decode.Side`."""
        return 8 // self.held_bits

    @property
    def bias(self) -> int:
        """What unpacked codes are too large by."""
        return -centre(self.fmt)

    def unpacked(self, words: jax.Array, bits: int) -> jax.Array:
        """See `Side`."""
        return int8_codes(words, bits)

    def arrays(self, x: Summed) -> Summed:  # type: ignore[override]
        """See `Side`."""
        return Summed(super().arrays(x.rows), self.metadata_array(x.sums))

    def specs(self, x: Summed, block_of) -> Summed:  # type: ignore[override]
        """See `Side`."""
        return Summed(super().specs(x.rows, block_of), self.metadata_spec(block_of))

    def sums_of_int8(self, sums: jax.Array) -> jax.Array:
        """Sums of the codes as they are multiplied, f32."""
        whole = sums if sums.dtype == jnp.int32 else sums.astype(jnp.int32)
        return whole.astype(jnp.float32) - float(centre(self.fmt) * self.fmt.group_size)


class Keys(_Integers):
    """Keys, grouped per token."""

    def prepare(self, x: Summed, scratch: Scratch, live, q: Any = None) -> None:  # type: ignore[override]
        """See `Side`."""
        del q
        super().prepare(x.rows, scratch, live)

    def read(self, x: Summed, scratch: Scratch, i, live, dtype) -> "KeyTile":  # type: ignore[override]
        """See `Side`."""
        tile = super().read(x.rows, scratch, i, live, jnp.int8)
        sums = self.sums_of_int8(x.sums[:, pl.ds(pl.multiple_of(i * self.tile, LANES), self.tile)])
        return KeyTile(self, tile.codes, tile.scale, tile.offset, self.in_order(sums))


class Values(_Integers):
    """Values, grouped per channel."""

    def scratch(self, num_queries: int = 0) -> IntegerScratch:  # type: ignore[override]
        """See `Side`."""
        del num_queries
        return IntegerScratch(super().scratch(), pltpu.VMEM((self.block // self.fmt.group_size, self.dim), jnp.float32))

    def prepare(self, x: Summed, scratch: IntegerScratch, live, q: Any = None) -> None:  # type: ignore[override]
        """See `Side`."""
        del q
        super().prepare(x.rows, scratch.rows, live)
        sums = self.sums_of_int8(x.sums[...])
        scratch.sums[...] = sums.T if self.transposed else sums

    def read(self, x: Summed, scratch: IntegerScratch, i, live, dtype) -> "ValueTile":  # type: ignore[override]
        """See `Side`."""
        tile = super().read(x.rows, scratch.rows, i, live, jnp.int8)
        return ValueTile(self, tile.codes, tile.scale, tile.offset, scratch.sums, i)


@dataclasses.dataclass(frozen=True)
class KeyTile:
    """Consecutive keys at work."""

    side: Keys
    codes: jax.Array  # i8[T, D]
    scale: jax.Array  # f32[G, T], as what follows
    offset: jax.Array
    sums: jax.Array

    def dot(self, q: Queries) -> jax.Array:
        """Logits f32[R, T]."""
        products = _dot(q.codes, self.codes, 1)  # [G * R, T]
        num_rows, shifts = q.codes.shape[0] // self.scale.shape[0], self.scale * self.sums
        logits = jnp.zeros((num_rows, self.side.tile), jnp.float32)
        for g in range(self.scale.shape[0]):
            mine, row = slice(g * num_rows, (g + 1) * num_rows), slice(g, g + 1)
            scale, offset, whole = (repeat_lanes(x[mine], self.side.tile) for x in (q.scale, q.offset, q.whole))
            logits += products[mine] * scale * self.scale[row] + offset * shifts[row] + whole * self.offset[row]
        return logits


@dataclasses.dataclass(frozen=True)
class ValueTile:
    """Consecutive values at work."""

    side: Values
    codes: jax.Array  # i8[T, D]
    scale: jax.Array  # refs f32[P / g, D], as what follows
    offset: jax.Array
    sums: jax.Array
    index: jax.Array  # of the tile in its block

    def mix(self, keep: jax.Array, sums: tuple[jax.Array, ...], p: jax.Array) -> tuple[jax.Array, ...]:
        """Add the product of p f32[R, T], rounded to 8 bits a group of tokens, to `sums * keep`."""
        size, num_rows = self.side.fmt.group_size, p.shape[0]
        token = tokens_of_lanes(lax.broadcasted_iota(jnp.int32, (num_rows, LANES), 1), self.side.places)
        members = [token // size == n for n in range(LANES // size)]
        total = sums[0] * repeat_lanes(keep, self.side.dim)
        for first in range(0, self.side.tile, LANES):
            codes, scales, offsets = _to_int8(p[:, first : first + LANES], members)
            stacked = jnp.concatenate(codes)
            products = _dot(stacked.astype(jnp.int32).astype(jnp.int8), self.codes[first : first + LANES], 0)
            for n, (scale, offset) in enumerate(zip(scales, offsets, strict=True)):
                whole = scale * codes[n].sum(1, keepdims=True) + offset * size
                mine, group = slice(n * num_rows, (n + 1) * num_rows), first // size + n
                by_scale = products[mine] * scale + offset * self._of_group(self.sums, group)
                total += by_scale * self._of_group(self.scale, group) + whole * self._of_group(self.offset, group)
        return (total,)

    def dot(self, q: Any) -> jax.Array:
        """Values are not multiplied by queries."""
        raise NotImplementedError

    def _of_group(self, metadata: jax.Array, group: int) -> jax.Array:
        """Row of a group of the tile, f32[1, D]."""
        return metadata[pl.ds(self.index * (self.side.tile // self.side.fmt.group_size) + group, 1), :]


def _to_int8(p: jax.Array, members: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """`partitions.to_int8` of the groups of 128 probabilities: codes f32[R, 128], zero outside a group, and [R, 1]."""
    codes, scales, offsets = [], [], []
    for mine in members:
        low = jnp.where(mine, p, 1.0).min(1, keepdims=True)  # probabilities lie in 0 .. 1
        scale, inverse = step_to_int8(low, jnp.where(mine, p, 0.0).max(1, keepdims=True))
        codes.append(jnp.where(mine, jnp.clip(jnp.round((p - low) * inverse), 0, 255) - 128, 0.0))
        scales.append(scale)
        offsets.append(low + 128 * scale)
    return codes, scales, offsets


def _dot(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Contract the last axis of i8 `left` with `axis` of i8 `right`, in float32 but exact."""
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, dims, preferred_element_type=jnp.int32).astype(jnp.float32)
