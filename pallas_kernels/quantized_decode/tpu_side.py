"""Keys or values of one block in the TPU kernel: where they lie, and their product with queries or probabilities.

Codes enter the matrix unit as they are, less 2**(bits - 1). Scales that share a row of the left operand are folded into
it; where one row needs several (a token's groups of channels, or the groups of tokens of 128 columns), the left operand
is stacked once a group and each group's part is picked from the product, which costs rows the unit has to spare.
Zero points, and the 2**(bits - 1), are corrections of rank one a group.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.tpu_rows import (
    LANES,
    centred_codes,
    metadata_in,
    metadata_value,
    repeat_lanes,
    tokens_along_lanes,
    words_of_three,
)


class Scratch(NamedTuple):
    """A block's rows, ready to use: x ~ (code - 2**(bits - 1)) * scale + offset; zero beyond the row's length."""

    scale: jax.Array  # f32[D / g, P] per token, f32[P / g, D] per channel
    offset: jax.Array  # as scale
    codes: jax.Array | None  # the block with D along lanes, where it came otherwise
    nibbles: jax.Array | None  # see `words_of_three`


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

    def arrays(self, x: Quantized) -> Quantized:
        """Views of the arrays as the kernel reads them; none is a copy in the layouts that XLA chooses."""
        turn = [self.transposed, self.per_token or self.transposed, self.per_token or self.transposed]
        parts = [x.codes, *(None if part is None else metadata_in(part) for part in x[1:])]
        return Quantized(
            *(part.swapaxes(-1, -2) if part is not None and t else part for part, t in zip(parts, turn, strict=True))
        )

    def specs(self, x: Quantized, block_of) -> Quantized:
        """Blocks of arrays [B, K, ...] of `arrays`, walked along tokens by `block_of(row, head, step, length)`."""
        rows = self._rows(self.block)
        codes = _spec((self.dim, rows) if self.transposed else (rows, self.dim), self.transposed, block_of)
        groups = self.block // self.fmt.group_size
        if self.per_token:
            meta = _spec((self.dim // self.fmt.group_size, self.block), True, block_of)
        else:
            meta = _spec((self.dim, groups) if self.transposed else (groups, self.dim), self.transposed, block_of)
        return Quantized(codes, meta, None if x.zero_point is None else meta)

    def scratch(self) -> Scratch:
        """Memory for one block."""
        size, group = self.block, self.fmt.group_size
        meta = (self.dim // group, size) if self.per_token else (size // group, self.dim)
        dtype = jnp.uint8 if self.fmt.bits == 8 else jnp.uint32
        return Scratch(
            pltpu.VMEM(meta, jnp.float32),
            pltpu.VMEM(meta, jnp.float32),
            pltpu.VMEM((self._rows(size), self.dim), dtype) if self.transposed else None,
            pltpu.VMEM((self.tile // 8, self.dim), jnp.uint32) if self.fmt.bits == 3 else None,
        )

    def prepare(self, x: Quantized, scratch: Scratch, live) -> None:
        """Decode the metadata of a block of which `live` tokens count, and turn its words if need be."""
        scale, shift = metadata_value(x.scale[...]), float(2 ** (self._held_bits - 1))
        if self.fmt.symmetric:
            offset = scale * (shift - self.fmt.num_levels // 2)
        else:
            offset = scale * shift + metadata_value(x.zero_point[...])
        if self.transposed and not self.per_token:
            scale, offset = scale.T, offset.T
        if self.per_token:
            counts = lax.broadcasted_iota(jnp.int32, scale.shape, 1) < live
        else:
            counts = lax.broadcasted_iota(jnp.int32, scale.shape, 0) * self.fmt.group_size < live
        scratch.scale[...] = jnp.where(counts, scale, 0.0)
        scratch.offset[...] = jnp.where(counts, offset, 0.0)
        if self.transposed:
            words = x.codes[...]
            turned = words.astype(jnp.int32).T if self.fmt.bits == 8 else lax.bitcast_convert_type(words, jnp.int32).T
            scratch.codes[...] = turned.astype(scratch.codes.dtype)

    def codes(self, x: Quantized, scratch: Scratch, i, dtype) -> jax.Array:
        """Codes of tile i, less 2**(bits - 1): [T, D]."""
        ref = scratch.codes if self.transposed else x.codes
        rows = self._rows(self.tile)
        start = pl.multiple_of(i * rows, rows)
        if self.fmt.bits == 3:
            return centred_codes(words_of_three(ref, start, self.tile, scratch.nibbles), 4, dtype)
        words = ref[pl.ds(start, rows), :]
        if self.fmt.bits == 8:
            words = pltpu.bitcast(words, jnp.uint32)
        return centred_codes(words, self.fmt.bits, dtype)

    def dot(self, q: jax.Array, codes: jax.Array, scratch: Scratch, i) -> jax.Array:
        """Logits of tile i: q f32[R, D] -> f32[R, T]."""
        dtype = codes.dtype
        if self.per_token:
            scale, offset = self._of_tile(scratch, i)
            masked = [jnp.where(mine, q, 0.0) for mine in self._channels(q.shape)]
            products = _dot(jnp.concatenate(masked).astype(dtype), codes, 1)  # [G * R, T]
            logits = jnp.zeros((q.shape[0], self.tile), jnp.float32)
            for g, part in enumerate(masked):
                product = products[g * q.shape[0] : (g + 1) * q.shape[0]]
                logits += product * scale[g : g + 1] + part.sum(1, keepdims=True) * offset[g : g + 1]
            return logits
        chunks = []
        for first, groups in self._chunks():
            rows = [self._of_group(scratch, i, g) for g in groups]
            scaled = jnp.concatenate([q * scale for scale, _ in rows]).astype(dtype)
            products = _dot(scaled, codes[first : first + LANES], 1)  # [groups * R, 128]
            products += jnp.concatenate([(q * offset).sum(1, keepdims=True) for _, offset in rows])
            logits = products[: q.shape[0]]
            lane = first + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            for n, g in enumerate(groups[1:], 1):
                part = products[n * q.shape[0] : (n + 1) * q.shape[0]]
                logits = jnp.where(lane >= g * self.fmt.group_size, part, logits)
            chunks.append(logits)
        return jnp.concatenate(chunks, 1)

    def zero_mix(self, num_rows: int) -> tuple[jax.Array, ...]:
        """What `mix` adds up: products [G * R, D] and corrections [G * R, 128] per token; [R, D] per channel."""
        stack = num_rows * (self.dim // self.fmt.group_size if self.per_token else 1)
        widths = (self.dim, LANES) if self.per_token else (self.dim,)
        return tuple(jnp.zeros((stack, width), jnp.float32) for width in widths)

    def mix(self, keep: jax.Array, sums, p: jax.Array, codes: jax.Array, scratch: Scratch, i) -> tuple[jax.Array, ...]:
        """Return `sums * keep` plus the product of p f32[R, T] with tile i; keep f32[R, 128] has equal lanes."""
        dtype, num_rows = codes.dtype, p.shape[0]
        if self.per_token:
            scale, offset = self._of_tile(scratch, i)
            groups = range(scale.shape[0])
            stacked = jnp.concatenate([keep] * len(groups))
            scaled = jnp.concatenate([p * scale[g : g + 1] for g in groups]).astype(dtype)
            shifts = jnp.concatenate([fold_lanes(p * offset[g : g + 1]) for g in groups])
            products, shifted = sums
            return (
                products * repeat_lanes(stacked, self.dim) + _dot(scaled, codes, 0),
                shifted * stacked + shifts,
            )
        total = sums[0] * repeat_lanes(keep, self.dim)
        for first, groups in self._chunks():
            part = p[:, first : first + LANES]
            lane = first + lax.broadcasted_iota(jnp.int32, part.shape, 1)
            own = [jnp.where(lane // self.fmt.group_size == g, part, 0.0) for g in groups]
            products = _dot(jnp.concatenate(own).astype(dtype), codes[first : first + LANES], 0)  # [groups * R, D]
            for n, g in enumerate(groups):
                scale, offset = self._of_group(scratch, i, g)
                total += products[n * num_rows : (n + 1) * num_rows] * scale + own[n].sum(1, keepdims=True) * offset
        return (total,)

    def finish_mix(self, sums: tuple[jax.Array, ...], num_rows: int) -> jax.Array:
        """The sums of `mix` as f32[R, D]."""
        if not self.per_token:
            return sums[0]
        products = sums[0] + sums[1].sum(1, keepdims=True)
        acc = jnp.zeros((num_rows, self.dim), jnp.float32)
        for g, mine in enumerate(self._channels(acc.shape)):
            acc = jnp.where(mine, products[g * num_rows : (g + 1) * num_rows], acc)
        return acc

    @property
    def _held_bits(self) -> int:
        """Bits of a code by the time it is a signed integer."""
        return 4 if self.fmt.bits == 3 else self.fmt.bits

    def _rows(self, tokens: int) -> int:
        return tokens if self.fmt.bits == 8 else tokens * self.fmt.bits // 32

    def _channels(self, shape: tuple[int, ...]) -> list[jax.Array]:
        """Which lanes each group of channels has."""
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        size = self.fmt.group_size
        return [(lane >= first) & (lane < first + size) for first in range(0, self.dim, size)]

    def _chunks(self) -> list[tuple[int, list[int]]]:
        """First token of every 128 of a tile, and the groups of tokens that these belong to."""
        size = self.fmt.group_size
        return [
            (first, list(range(first // size, (first + LANES - 1) // size + 1))) for first in range(0, self.tile, LANES)
        ]

    def _of_tile(self, scratch: Scratch, i) -> tuple[jax.Array, jax.Array]:
        """Per token: scale and offset of tile i, f32[D / g, T]."""
        at = pl.ds(pl.multiple_of(i * self.tile, LANES), self.tile)
        return scratch.scale[:, at], scratch.offset[:, at]

    def _of_group(self, scratch: Scratch, i, group: int) -> tuple[jax.Array, jax.Array]:
        """Per channel: scale and offset of a group of tile i, f32[1, D]."""
        at = pl.ds(i * (self.tile // self.fmt.group_size) + group, 1)
        return scratch.scale[at, :], scratch.offset[at, :]


def _spec(shape: tuple[int, int], tokens_last: bool, block_of) -> pl.BlockSpec:
    def index(b, h, j, length):
        step = block_of(b, j, length)
        return (b, h, 0, step) if tokens_last else (b, h, step, 0)

    return pl.BlockSpec((None, None, *shape), index)


def _dot(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Contract the last axis of `left` with `axis` of `right`, exactly if they are float32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)


def fold_lanes(x: jax.Array) -> jax.Array:
    """[R, T] -> [R, 128] with the same sum."""
    return sum((x[:, i : i + LANES] for i in range(LANES, x.shape[1], LANES)), start=x[:, :LANES])
