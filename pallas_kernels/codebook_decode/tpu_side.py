"""Keys or values of the TPU kernel whose codes stand for levels: picked from a register, units folded in elsewhere.

A register's lanes hold all levels, or all pairs of levels in bfloat16, and a pick along lanes decodes 1,024 codes, or
2,048. Scales, zero points and outliers of a token never touch what was picked: keys have theirs on the logits, values
on the probabilities, where tokens lie along lanes.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.codebook_decode.rows import CodebookRows
from pallas_kernels.codebook_decode.tpu_queries import Queries
from pallas_kernels.quantized_decode.tpu_side import Side, block_spec, dot, finite
from pallas_kernels.rotary import cosine
from pallas_kernels.tpu_rows import (
    LANES,
    SUBLANES,
    lane_slices,
    metadata_in,
    metadata_value,
    order_of,
    permute_lanes,
    pick,
    repeat_lanes,
    tokens_along_lanes,
    whole_lanes,
)

_PAIRS = 3  # the most bits whose pairs of levels fit one register's lanes


class Stored(NamedTuple):
    """Rows as the kernel reads them; heads that are joined share an axis of 1."""

    codes: jax.Array  # u32[B, K or 1, words, C], or [B, K or 1, C, words] where XLA stores them so
    levels: jax.Array  # i32[n, 128], see `level_table`
    scale: jax.Array | None  # [B, K or 1, 1, S]
    zero_point: jax.Array | None  # as scale
    outliers: jax.Array | None  # [B, K or 1, m, S]
    channels: jax.Array | None  # as outliers, integers
    first: jax.Array | None  # i32[1, K, 8, 128], the first channel of each head of those that are joined
    pos: jax.Array | None  # i32[B, K or 1, 1, S] of keys that rotate
    turns: jax.Array | None  # f32[2, W] of keys that rotate: radians a position and the phase of each lane


@dataclasses.dataclass(frozen=True)
class Levels(Side):
    """Rows as codes of levels; see `tpu_decode.Side`. Lanes beyond `dim` hold anything finite.

    `fmt` has the bits of a code, and nothing else of it counts.
    """

    heads: int  # that are joined in a row; 1 where each has rows of its own
    single: bool  # whether levels are picked in float32, not in pairs of bfloat16
    num_pairs: int = 0  # of channels that rotate

    @property
    def transposed(self) -> bool:
        """See `Side`."""
        return tokens_along_lanes(self.dim * self.heads)

    @property
    def places(self) -> int:
        """See `Side`."""
        return (32 if self.single else 16) // self.held_bits

    @property
    def width(self) -> int:
        """Lanes of a row at work."""
        return whole_lanes(self.dim)

    @property
    def _window(self) -> bool:
        """Whether 128 lanes of joined rows are read of which a head has a part."""
        return self.heads > 1 and not self.transposed and self.dim < LANES

    def arrays(self, x: tuple[CodebookRows, jax.Array | None, jax.Array | None]) -> Stored:  # type: ignore[override]
        """Views of rows as the kernel reads them; of keys that rotate with positions and `lane_turns`."""
        rows, pos, turns = x
        return self._stored(rows, pos, turns)

    def _stored(self, x: CodebookRows, pos: jax.Array | None, turns: jax.Array | None) -> Stored:
        first, channels = None, x.outlier_channels
        if self.heads > 1:
            first = jnp.arange(self.heads, dtype=jnp.int32)[None, :, None, None] * self.dim
            first = jnp.broadcast_to(first, (1, self.heads, SUBLANES, LANES))
        if channels is not None and channels.dtype == jnp.uint16:
            channels = lax.bitcast_convert_type(channels, jnp.int16)
        return Stored(
            x.codes.swapaxes(-1, -2) if self.transposed else x.codes,
            level_table(jnp.asarray(x.levels), self.single),
            None if x.scale is None else metadata_in(x.scale)[:, :, None],
            None if x.zero_point is None else metadata_in(x.zero_point)[:, :, None],
            None if x.outliers is None else metadata_in(x.outliers).swapaxes(-1, -2),
            None if channels is None else channels.swapaxes(-1, -2),
            first,
            None if turns is None or pos is None else pos[:, :, None],
            turns,
        )

    def specs(self, x: Stored, block_of) -> Stored:  # type: ignore[override]
        """See `tpu_decode.Side`."""
        rows = self._rows(self.block)
        width = LANES if self._window else self.dim
        codes = (self.dim, rows) if self.transposed else (rows, width)

        def of_codes(h):
            return (0, h * self.dim // width) if self.heads > 1 else (h, 0)

        def by_token(array: jax.Array | None) -> pl.BlockSpec | None:
            if array is None:
                return None
            shared = array.shape[1] == 1
            return block_spec((array.shape[2], self.block), True, block_of, lambda h: (0 if shared else h, 0))

        def whole(array: jax.Array | None) -> pl.BlockSpec | None:
            return None if array is None else pl.BlockSpec(array.shape, lambda b, h, j, length: (0, 0))

        return Stored(
            block_spec(codes, self.transposed, block_of, of_codes),
            whole(x.levels),
            *(by_token(array) for array in (x.scale, x.zero_point, x.outliers, x.channels)),
            None
            if x.first is None
            else pl.BlockSpec((None, None, SUBLANES, LANES), lambda b, h, j, length: (0, h, 0, 0)),
            by_token(x.pos),
            whole(x.turns),
        )  # type: ignore[arg-type]

    def scratch(self, num_queries: int = 0) -> Any:
        """See `tpu_decode.Side`."""
        held = super().scratch(num_queries)
        codes = None if held.codes is None else pltpu.VMEM((self._rows(self.block), self.width), jnp.uint32)
        sizes = self._rows(self.tile), self.tile // 8
        three = None if held.three is None else tuple(pltpu.VMEM((rows, LANES), jnp.uint32) for rows in sizes)
        return held._replace(codes=codes, three=three)

    def read(self, x: Stored, scratch: Any, i, live, dtype) -> "LevelTile":  # type: ignore[override]
        """See `tpu_decode.Side`."""
        words = lax.bitcast_convert_type(self.words_of(x, scratch, i), jnp.int32)
        if self._window:
            lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
            words = pick([words], (lane + x.first[:1, :]) & (LANES - 1))
        return LevelTile(self, x, self.parts(words), i, live, dtype)

    def zero_mix(self, num_rows: int) -> tuple[jax.Array, ...]:
        """What `LevelTile.mix` adds up: products, outliers' products, zero points spread over lanes."""
        widths = self.width, self.dim, LANES
        return tuple(jnp.zeros((num_rows, width), jnp.float32) for width in widths)

    def finish_mix(self, sums: tuple[jax.Array, ...], num_rows: int) -> jax.Array:
        """See `tpu_decode.Side`."""
        del num_rows
        products, outliers, shifts = sums
        return products[:, : self.dim] + outliers + shifts.sum(1, keepdims=True)

    def picked(self, words: jax.Array, levels: jax.Array) -> jax.Array:
        """Levels of 128 tokens in the order of `places`: f32 or bf16 [128, W]."""
        return jnp.concatenate([self._picked(words[:, lanes], levels) for lanes in lane_slices(self.width)], 1)

    def _picked(self, words: jax.Array, levels: jax.Array) -> jax.Array:
        bits, held, mask = self.fmt.bits, self.held_bits, 2**self.fmt.bits - 1
        tables = [jnp.broadcast_to(levels[i : i + 1], words.shape) for i in range(levels.shape[0])]
        if self.single:
            found = [pick(tables, (words >> shift) & mask) for shift in range(0, 32, held)]
            return lax.bitcast_convert_type(jnp.concatenate(found), jnp.float32)
        parts = []
        for shift in range(0, 16, held):
            if bits <= _PAIRS:
                both = ((words >> shift) & mask) | ((words >> (16 + shift - bits)) & (mask << bits))
                pairs = pick(tables, both)
            else:
                low, high = (
                    pick([table], (words >> at) & mask) for table, at in zip(tables, (shift, 16 + shift), strict=True)
                )
                pairs = low | high
            parts.append(pltpu.bitcast(pairs, jnp.bfloat16))
        return jnp.concatenate(parts)


def level_table(levels: jax.Array, single: bool) -> jax.Array:
    """Levels along the lanes of a register, as bits i32[n, 128]: each in float32, or else in bfloat16 by pairs.

    A pair of codes that is no more than 6 bits has its own lane; of 4 bits a code, each half of a pair has its table.
    """
    if single:
        return jnp.resize(lax.bitcast_convert_type(levels, jnp.int32), (1, LANES))
    half = lax.bitcast_convert_type(levels.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    num_levels = len(levels)
    if num_levels <= 2**_PAIRS:
        rows = (jnp.tile(half, num_levels) | jnp.repeat(half << 16, num_levels))[None]
    else:
        rows = jnp.stack([half, half << 16])
    repeated = jnp.tile(rows, (1, LANES // rows.shape[1]))
    return lax.bitcast_convert_type(repeated, jnp.int32)


@dataclasses.dataclass(frozen=True)
class LevelTile:
    """Consecutive tokens at work, 128 at a time."""

    side: Levels
    x: Stored  # of the block
    words: list[jax.Array]  # i32[n, W] of 128 tokens each
    index: jax.Array  # of the tile in its block
    live: jax.Array  # tokens of the block that count
    dtype: Any

    def dot(self, q: Queries) -> jax.Array:
        """See `tpu_decode.Tile`."""
        return jnp.concatenate([self._logits(q, n) for n in range(len(self.words))], 1)

    def mix(self, keep: jax.Array, sums: tuple[jax.Array, ...], p: jax.Array) -> tuple[jax.Array, ...]:
        """See `tpu_decode.Tile`."""
        products, outliers, shifts = (x * repeat_lanes(keep, x.shape[1]) for x in sums)
        for n in range(len(self.words)):
            here = p[:, n * LANES : (n + 1) * LANES]
            scaled = here if self.x.scale is None else here * self._in_order(self.x.scale, n)
            products += dot(scaled.astype(self.dtype), self._picked(n).astype(self.dtype), 0)
            if self.x.zero_point is not None:
                shifts += here * self._in_order(self.x.zero_point, n)
            if self.x.outliers is not None:
                ordered = permute_lanes(here, order_of(self.side.places, 1))
                outliers += dot(ordered.astype(self.dtype), self._placed(n).astype(self.dtype), 1)
        return products, outliers, shifts

    def _logits(self, q: Queries, n: int) -> jax.Array:
        """Logits of 128 tokens: f32[R, 128]."""
        found, cosines = self._picked(n), None
        if self.x.turns is None or q.cross is None:
            logits = dot(q.own.astype(self.dtype), found.astype(self.dtype), 1)
        else:
            cosines = self._cosines(n)
            logits = dot(q.own.astype(self.dtype), (found * cosines).astype(self.dtype), 1)
            logits += dot(q.cross.astype(self.dtype), (found * self._across(cosines)).astype(self.dtype), 1)

        def of_zero_points(w: jax.Array) -> jax.Array:
            if cosines is None:
                return w.sum(1, keepdims=True)
            return dot(w.astype(self.dtype), cosines.astype(self.dtype), 1)

        if self.x.scale is not None:
            logits *= self._in_order(self.x.scale, n)
        if q.shift is not None:
            logits += of_zero_points(q.shift)
        if q.unit is not None:
            logits += of_zero_points(q.unit) * self._in_order(self.x.zero_point, n)
        if self.x.outliers is not None:
            logits += self.side.in_order(self._outlier_logits(q, n))
        return logits

    def _picked(self, n: int) -> jax.Array:
        return self.side.picked(self.words[n], self.x.levels[...])

    def _cosines(self, n: int) -> jax.Array:
        """Cosines of the lanes of tokens, [128, W], see `lane_turns`."""
        pos = self.side.in_order(self._by_token(self.x.pos, n))  # [1, 128]
        column = jnp.broadcast_to(pos, (LANES, LANES)).T
        turns = self.x.turns[...]
        return cosine(repeat_lanes(column, self.side.width) * turns[:1], turns[1:])

    def _across(self, cosines: jax.Array) -> jax.Array:
        """Sines for lanes that have cosines, and the other way round."""
        width, n = self.side.width, self.side.num_pairs
        forth = pltpu.roll(cosines, n, 1)
        if 2 * n == width:
            return forth
        lane = lax.broadcasted_iota(jnp.int32, cosines.shape, 1)
        return jnp.where(lane < n, pltpu.roll(cosines, width - n, 1), forth)

    def _outlier_logits(self, q: Queries, n: int) -> jax.Array:
        """What outliers add to logits, tokens in order: f32[R, 128]."""
        values, channels, _ = self._outliers(n)
        factors = [values]
        if self.x.turns is not None:
            turns = self.x.turns[...]
            rows = [
                [jnp.broadcast_to(row[:, lanes], channels.shape) for lanes in lane_slices(self.side.width)]
                for row in (turns[:1], turns[1:])
            ]
            frequency, phase = (pick(row, channels) for row in rows)
            angle = self._by_token(self.x.pos, n) * frequency
            other = jnp.where(channels < 2 * self.side.num_pairs, math.pi / 2 - phase, 0.0)
            factors = [values * cosine(angle, phase), values * cosine(angle, other)]
        logits = jnp.zeros((q.own.shape[0], LANES), jnp.float32)
        for j in range(self.x.outliers.shape[0]):
            row = slice(j, j + 1)
            index = jnp.broadcast_to(channels[row], logits.shape)
            for w, factor in zip(q, factors, strict=False):  # with `own` alone, or with `cross` too
                logits += pick([w[:, lanes] for lanes in lane_slices(w.shape[1])], index) * factor[row]
        return logits

    def _placed(self, n: int) -> jax.Array:
        """Outliers where they belong, tokens in order along lanes: f32[D, 128]."""
        values, channels, mine = self._outliers(n)
        channels = jnp.where(mine, channels, -1)
        channel = lax.broadcasted_iota(jnp.int32, (self.side.dim, LANES), 0)
        placed = jnp.zeros(channel.shape, jnp.float32)
        for j in range(self.x.outliers.shape[0]):
            placed = jnp.where(channel == channels[j : j + 1], values[j : j + 1], placed)
        return placed

    def _outliers(self, n: int) -> tuple[jax.Array, ...]:
        """Outliers of 128 tokens in order and their channels in the head; both are 0 where they are another head's.

        Which are this head's comes third.
        """
        values = self._by_token(self.x.outliers, n)
        channels = self.x.channels[:, self._lanes(n)].astype(jnp.int32) & 0xFFFF
        if self.x.first is not None:
            channels -= self.x.first[:1, :]
        mine = (channels >= 0) & (channels < self.side.dim)
        values, channels = jnp.where(mine, values, 0.0), jnp.where(mine, channels, 0)
        rows = max(values.shape[0], 2)  # Mosaic gathers along lanes for more than one row
        return tuple(jnp.broadcast_to(x, (rows, LANES)) if x.shape[0] == 1 else x for x in (values, channels, mine))

    def _in_order(self, x: Any, n: int) -> jax.Array:
        """One number a token, f32[1, 128] in the order of `places`."""
        return self.side.in_order(self._by_token(x, n))

    def _by_token(self, x: Any, n: int) -> jax.Array:
        """Numbers of 128 tokens, f32[m, 128], zero where no token is."""
        values = metadata_value(x[:, self._lanes(n)])
        token = self.index * self.side.tile + n * LANES + lax.broadcasted_iota(jnp.int32, values.shape, 1)
        return finite(values, token < self.live, x.dtype)

    def _lanes(self, n: int) -> Any:
        return pl.ds(pl.multiple_of(self.index * self.side.tile + n * LANES, LANES), LANES)
