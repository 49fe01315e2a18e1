"""Keys or values of one block in the TPU kernel: where they lie, and their product with queries or probabilities.

Codes enter the matrix unit as they are, plus a bias. Scales that share a row of the left operand are folded into it;
where one row needs several (a token's groups of channels, or the groups of tokens of 128 columns), the left operand is
stacked once a group and each group's part is picked from the product, which costs rows that the unit has to spare.
Zero points and the bias are corrections of rank one a group.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.tpu_rows import (
    CODE_BIAS,
    LANES,
    biased_codes,
    fold_lanes,
    metadata_in,
    metadata_value,
    order_of,
    permute_lanes,
    repeat_lanes,
    tokens_along_lanes,
    tokens_of_lanes,
    words_of_three,
)


class Scratch(NamedTuple):
    """Parts of a block that are made ready once for all its tiles."""

    scale: jax.Array | None  # per channel: f32[P / g, D], zero beyond the row's length
    offset: jax.Array | None  # as scale
    correction: jax.Array | None  # keys per channel: offset times q, f32[P / T, R, 128], a tile's groups along lanes
    codes: jax.Array | None  # the block with D along lanes, where it came otherwise
    three: tuple[jax.Array, jax.Array] | None  # see `words_of_three`


@dataclasses.dataclass(frozen=True)
class Side:
    """Keys or values, `block` tokens in memory at a time and `tile` at work."""

    fmt: Format
    dim: int
    block: int
    tile: int

    @property
    def transposed(self) -> bool:
        """Whether arrays come with tokens along lanes."""
        return tokens_along_lanes(self.dim)

    @property
    def per_token(self) -> bool:
        """Whether a scale covers channels of a token."""
        return self.fmt.axis == "token"

    @property
    def held_bits(self) -> int:
        """Bits between codes by the time they are unpacked."""
        return 4 if self.fmt.bits == 3 else self.fmt.bits

    @property
    def places(self) -> int:
        """What their order among 128 tokens follows from, see `tokens_of_lanes`."""
        return 1 if self.held_bits == 8 else 16 // self.held_bits

    @property
    def bias(self) -> int:
        """What unpacked codes are too large by."""
        return CODE_BIAS[self.held_bits]

    def arrays(self, x: Quantized) -> Quantized:
        """Views of the arrays as the kernel reads them; none is a copy in the layouts that XLA chooses."""
        codes = x.codes.swapaxes(-1, -2) if self.transposed else x.codes
        return Quantized(codes, *(None if part is None else self.metadata_array(part) for part in x[1:]))

    def metadata_array(self, x: jax.Array) -> jax.Array:
        """The view of an array shaped as the scales."""
        x = metadata_in(x)
        return x.swapaxes(-1, -2) if self.per_token or self.transposed else x

    def specs(self, x: Quantized, block_of) -> Quantized:
        """Blocks of arrays [B, K, ...] of `arrays`, walked along tokens by `block_of(row, step, length)`."""
        rows, metadata = self._rows(self.block), self.metadata_spec(block_of)
        codes = block_spec((self.dim, rows) if self.transposed else (rows, self.dim), self.transposed, block_of)
        return Quantized(codes, metadata, None if x.zero_point is None else metadata)

    def metadata_spec(self, block_of) -> pl.BlockSpec:
        """Blocks of a `metadata_array`."""
        if self.per_token:
            return block_spec((self.dim // self.fmt.group_size, self.block), True, block_of)
        groups = self.block // self.fmt.group_size
        shape = (self.dim, groups) if self.transposed else (groups, self.dim)
        return block_spec(shape, self.transposed, block_of)

    def scratch(self, num_queries: int = 0) -> Scratch:
        """Memory for one block; of keys with `num_queries`."""
        metadata = None if self.per_token else pltpu.VMEM((self.block // self.fmt.group_size, self.dim), jnp.float32)
        correction = pltpu.VMEM((self.block // self.tile, num_queries, LANES), jnp.float32)
        turned = pltpu.VMEM((self._rows(self.block), self.dim), jnp.uint8 if self.fmt.bits == 8 else jnp.uint32)
        lanes = min(self.dim, LANES)
        three = tuple(pltpu.VMEM((rows, lanes), jnp.uint32) for rows in (self._rows(self.tile), self.tile // 8))
        return Scratch(
            metadata,
            metadata,
            correction if num_queries and not self.per_token else None,
            turned if self.transposed else None,
            three if self.fmt.bits == 3 else None,
        )

    def prepare(self, x: Quantized, scratch: Scratch, live, q: jax.Array | None = None) -> None:
        """Make a block ready of which `live` tokens count: decode scales per channel, turn words if need be."""
        if scratch.scale is not None and scratch.offset is not None:
            scale, offset = self.metadata(x, slice(None))
            if self.transposed:
                scale, offset = scale.T, offset.T
            token = lax.broadcasted_iota(jnp.int32, scale.shape, 0) * self.fmt.group_size
            scratch.scale[...], scratch.offset[...] = (finite(m, token < live, x.scale.dtype) for m in (scale, offset))
        if scratch.correction is not None:
            groups = self.tile // self.fmt.group_size
            for i in range(self.block // self.tile):
                offset = scratch.offset[i * groups : (i + 1) * groups]
                scratch.correction[i, :, :groups] = dot(q, offset, 1)
        if scratch.codes is not None:
            words = x.codes[...]
            turned = words.astype(jnp.int32).T if self.fmt.bits == 8 else lax.bitcast_convert_type(words, jnp.int32).T
            scratch.codes[:, : self.dim] = turned.astype(scratch.codes.dtype)

    def read(self, x: Quantized, scratch: Scratch, i, live, dtype) -> "Tile":
        """Tile i of a block of which `live` tokens count."""
        codes = self.codes_of(x, scratch, i, dtype)
        if not self.per_token:
            return Tile(self, codes, scratch.scale, scratch.offset, scratch.correction, i)
        scale, offset = self.metadata(x, pl.ds(pl.multiple_of(i * self.tile, LANES), self.tile))
        token = i * self.tile + lax.broadcasted_iota(jnp.int32, scale.shape, 1)
        metadata = (self.in_order(finite(m, token < live, x.scale.dtype)) for m in (scale, offset))
        return Tile(self, codes, *metadata, None, i)

    def zero_mix(self, num_rows: int) -> tuple[jax.Array, ...]:
        """What `Tile.mix` adds up: products [G * R, D] and corrections [G * R, 128] per token; [R, D] per channel."""
        if not self.per_token:
            return (jnp.zeros((num_rows, self.dim), jnp.float32),)
        stack = num_rows * (self.dim // self.fmt.group_size)
        return jnp.zeros((stack, self.dim), jnp.float32), jnp.zeros((stack, LANES), jnp.float32)

    def finish_mix(self, sums: tuple[jax.Array, ...], num_rows: int) -> jax.Array:
        """The sums of `Tile.mix` as f32[R, D]."""
        if not self.per_token:
            return sums[0]
        products = sums[0] + sums[1].sum(1, keepdims=True)
        acc = jnp.zeros((num_rows, self.dim), jnp.float32)
        for g, mine in enumerate(self.channels(acc.shape)):
            acc = jnp.where(mine, products[g * num_rows : (g + 1) * num_rows], acc)
        return acc

    def channels(self, shape: tuple[int, ...]) -> list[jax.Array]:
        """Which lanes each group of channels has."""
        lane, size = lax.broadcasted_iota(jnp.int32, shape, 1), self.fmt.group_size
        return [(lane >= first) & (lane < first + size) for first in range(0, self.dim, size)]

    def _rows(self, tokens: int) -> int:
        return tokens if self.fmt.bits == 8 else tokens * self.fmt.bits // 32

    def metadata(self, x: Quantized, lanes) -> tuple[jax.Array, jax.Array]:
        """Scale and offset, f32: x ~ biased code * scale + offset."""
        scale, bias = metadata_value(x.scale[:, lanes], positive=True), self.bias
        if x.zero_point is None:
            return scale, scale * float(-bias - self.fmt.num_levels // 2)
        return scale, metadata_value(x.zero_point[:, lanes]) - scale * float(bias)

    def in_order(self, x: jax.Array) -> jax.Array:
        """[G, T] by token -> by lane."""
        return x if self.places == 1 else permute_lanes(x, order_of(1, self.places))

    def unpacked(self, words: jax.Array, bits: int) -> jax.Array:
        """Codes of 128 tokens, or of any number at 8 bits, plus `bias`."""
        return biased_codes(words, bits)

    def codes_of(self, x: Quantized, scratch: Scratch, i, dtype) -> jax.Array:
        """Biased codes of tile i in the order of `tokens_of_lanes`: [T, D]."""
        words = self.words_of(x, scratch, i)
        if self.fmt.bits == 8:
            return self.unpacked(pltpu.bitcast(words, jnp.uint32), 8).astype(dtype)
        return jnp.concatenate([self.unpacked(part, self.held_bits) for part in self.parts(words)]).astype(dtype)

    def words_of(self, x: Any, scratch: Any, i) -> jax.Array:
        """Words of tile i, `held_bits` a code; bytes at 8 bits."""
        ref, rows = x.codes if scratch.codes is None else scratch.codes, self._rows(self.tile)
        words = ref[pl.ds(pl.multiple_of(i * rows, rows), rows), :]
        return words if scratch.three is None else words_of_three(words, *scratch.three)

    def parts(self, words: jax.Array) -> list[jax.Array]:
        """What `words_of` gave, cut into words of 128 tokens."""
        size = LANES * self.held_bits // 32
        return [words[first : first + size] for first in range(0, len(words), size)]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Consecutive tokens at work, in the order of `tokens_of_lanes`."""

    side: Side
    codes: jax.Array  # [T, D], biased
    scale: jax.Array  # per token f32[D / g, T]; per channel a ref, see `Scratch`
    offset: jax.Array
    correction: jax.Array | None  # a ref, see `Scratch`
    index: jax.Array  # of the tile in its block

    def dot(self, q: jax.Array) -> jax.Array:
        """Logits: q f32[R, D] -> f32[R, T]."""
        return self._dot_per_token(q) if self.side.per_token else self._dot_per_channel(q)

    def mix(self, keep: jax.Array, sums: tuple[jax.Array, ...], p: jax.Array) -> tuple[jax.Array, ...]:
        """Return `sums * keep` plus the product of p f32[R, T] with the tile; keep f32[R, 128] has equal lanes."""
        return (self._mix_per_token if self.side.per_token else self._mix_per_channel)(keep, sums, p)

    def _dot_per_token(self, q: jax.Array) -> jax.Array:
        num_rows = q.shape[0]
        stacked = jnp.concatenate([jnp.where(mine, q, 0.0) for mine in self.side.channels(q.shape)])
        products = dot(stacked.astype(self.codes.dtype), self.codes, 1)  # [G * R, T]
        sums = stacked.sum(1, keepdims=True)
        logits = jnp.zeros((num_rows, self.side.tile), jnp.float32)
        for g in range(self.scale.shape[0]):
            mine = slice(g * num_rows, (g + 1) * num_rows)
            logits += products[mine] * self.scale[g : g + 1] + sums[mine] * self.offset[g : g + 1]
        return logits

    def _dot_per_channel(self, q: jax.Array) -> jax.Array:
        num_rows, chunks = q.shape[0], []
        correction = self.correction[self.index]  # [R, 128]
        for first, groups in self._chunks():
            exact = jnp.concatenate([q * self._of_group(self.scale, g) for g in groups])
            scaled = rounded(exact, self.codes.dtype)
            products = dot(scaled.astype(self.codes.dtype), self.codes[first : first + LANES], 1)  # [groups * R, 128]
            products += self.side.bias * (exact - scaled).sum(1, keepdims=True)
            logits, token = products[:num_rows], self._token(q.shape[0])
            for n, g in enumerate(groups[1:], 1):
                starts = g * self.side.fmt.group_size - first
                logits = jnp.where(token >= starts, products[n * num_rows : (n + 1) * num_rows], logits)
            group = (first + token) // self.side.fmt.group_size
            chunks.append(logits + jnp.take_along_axis(correction, group, 1, mode="promise_in_bounds"))
        return jnp.concatenate(chunks, 1)

    def _mix_per_token(self, keep: jax.Array, sums: tuple[jax.Array, ...], p: jax.Array) -> tuple[jax.Array, ...]:
        groups = range(self.scale.shape[0])
        stacked = jnp.concatenate([keep] * len(groups))
        scaled = [rounded(p * self.scale[g : g + 1], self.codes.dtype) for g in groups]
        zero_point = self.offset + self.side.bias * self.scale
        shifts = jnp.concatenate([fold_lanes(p * zero_point[g : g + 1] - self.side.bias * scaled[g]) for g in groups])
        products, shifted = sums
        products = products * repeat_lanes(stacked, self.side.dim) + dot(
            jnp.concatenate(scaled).astype(self.codes.dtype), self.codes, 0
        )
        return products, shifted * stacked + shifts

    def _mix_per_channel(self, keep: jax.Array, sums: tuple[jax.Array, ...], p: jax.Array) -> tuple[jax.Array, ...]:
        total, num_rows, size = sums[0] * repeat_lanes(keep, self.side.dim), p.shape[0], self.side.fmt.group_size
        p = rounded(p, self.codes.dtype)
        for first, groups in self._chunks():
            part, token = p[:, first : first + LANES], self._token(num_rows)
            bounds = [(g * size - first, (g + 1) * size - first) for g in groups]
            own = [jnp.where((token >= start) & (token < stop), part, 0.0) for start, stop in bounds]
            stacked = jnp.concatenate(own).astype(self.codes.dtype)
            products = dot(stacked, self.codes[first : first + LANES], 0)  # [groups * R, D]
            for n, g in enumerate(groups):
                total += products[n * num_rows : (n + 1) * num_rows] * self._of_group(self.scale, g)
                total += own[n].sum(1, keepdims=True) * self._of_group(self.offset, g)
        return (total,)

    def _chunks(self) -> list[tuple[int, list[int]]]:
        """First token of every 128 of the tile, and the groups of tokens that these belong to."""
        size = self.side.fmt.group_size
        return [
            (first, list(range(first // size, (first + LANES - 1) // size + 1)))
            for first in range(0, self.side.tile, LANES)
        ]

    def _token(self, num_rows: int) -> jax.Array:
        """Token of each lane of a chunk: i32[R, 128]."""
        return tokens_of_lanes(lax.broadcasted_iota(jnp.int32, (num_rows, LANES), 1), self.side.places)

    def _of_group(self, metadata: jax.Array, group: int) -> jax.Array:
        """Per channel: row of `metadata` for a group of the tile, f32[1, D]."""
        return metadata[pl.ds(self.index * (self.side.tile // self.side.fmt.group_size) + group, 1), :]


def finite(x: jax.Array, live: jax.Array, stored: jax.typing.DTypeLike) -> jax.Array:
    """Zero what lies beyond the live tokens, where floats may be NaN; half floats are decoded to finite numbers."""
    return x if stored == jnp.int16 else jnp.where(live, x, 0.0)


def rounded(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What f32 `x` is in `dtype`, f32 or bf16: the bias must be taken off what was multiplied, not off what was meant.

    A code of 4 bits is biased by 16, so an error of rounding would count four times.
    """
    if dtype == jnp.float32:
        return x
    bits = lax.bitcast_convert_type(x, jnp.int32) + 0x8000
    return lax.bitcast_convert_type(bits & -0x10000, jnp.float32)


def block_spec(shape: tuple[int, int], tokens_last: bool, block_of, at: Callable = lambda h: (h, 0)) -> pl.BlockSpec:
    """Blocks of an array [B, K, ...] along its last axis, or the one before.

    Args:
      at: From a KV head, its place on the axis of heads and which block of the axis that is not walked is its own.
    """

    def index(b, h, j, length):
        (head, other), step = at(h), block_of(b, j, length)
        return (b, head, other, step) if tokens_last else (b, head, step, other)

    return pl.BlockSpec((None, None, *shape), index)


def dot(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Contract the last axis of `left` with `axis` of `right`, exactly if they are float32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)
