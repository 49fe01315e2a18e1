"""Decode attention on TPUs whatever the rows of K and V are: split over rows, KV heads and blocks of slots.

Lengths arrive before the blocks do, so that blocks beyond a row's length are neither fetched (the index stays at the
last live one) nor computed. Inside a block, tiles of slots are steps of online softmax whose state stays in registers.
How a tile is read and multiplied is for its `Side` to know.
"""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.prefill.reference import MASK_VALUE, capped
from pallas_kernels.tpu_rows import LANES, SUBLANES, fold_lanes, order_of, permute_lanes, repeat_lanes, tokens_of_lanes


class Tile(Protocol):
    """Consecutive tokens at work."""

    def dot(self, q: Any) -> jax.Array:
        """Logits f32[R, T] of the queries."""

    def mix(self, keep: jax.Array, sums: tuple[jax.Array, ...], p: jax.Array) -> tuple[jax.Array, ...]:
        """Return `sums * keep` plus the product of p f32[R, T] with the tile; keep f32[R, 128] has equal lanes."""


class Side(Protocol):
    """Keys or values, `block` tokens in memory at a time and `tile` at work."""

    @property
    def dim(self) -> int:
        """D."""

    @property
    def block(self) -> int:
        """Tokens in memory; a multiple of `tile`."""

    @property
    def tile(self) -> int:
        """Tokens at work; a multiple of 128."""

    @property
    def places(self) -> int:
        """Order of the tokens of a tile, see `tokens_of_lanes`."""

    def arrays(self, x: Any) -> Any:
        """Views of rows [B, K, S, ...] as the kernel reads them."""

    def specs(self, x: Any, block_of) -> Any:
        """Blocks of `arrays`, walked along tokens by `block_of(row, step, length)`."""

    def scratch(self, num_queries: int = 0) -> Any:
        """Memory for one block; of keys with `num_queries`."""

    def prepare(self, x: Any, scratch: Any, live: jax.Array, q: Any = None) -> None:
        """Make a block ready of which `live` tokens count."""

    def read(self, x: Any, scratch: Any, i: jax.Array, live: jax.Array, dtype: Any) -> Tile:
        """Tile i of a block, to be multiplied in `dtype` if in floats."""

    def zero_mix(self, num_rows: int) -> tuple[jax.Array, ...]:
        """What `Tile.mix` adds up."""

    def finish_mix(self, sums: tuple[jax.Array, ...], num_rows: int) -> jax.Array:
        """The sums of `Tile.mix` as f32[R, D]."""


def decode(
    name: str,
    q: Any,
    k: Any,
    v: Any,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    keys: Side,
    values: Side,
    num_rows: int,
    num_slots: int,
    dtype: Any,
    soft_cap: float | None,
    sliding_window: int | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attend from `num_rows` queries to `num_slots` slots and return the unnormalised state.

    Args:
      name: Of the kernel.
      q: What `keys` multiplies: arrays [B, K, *, *] made of `padded` queries.
      k, v: Rows as their sides take them.
      length, pos, q_pos, soft_cap, sliding_window: As in `quantized_decode`.
      dtype: Of float products.
    """
    batch, heads = jax.tree.leaves(q)[0].shape[:2]
    block, wanted, num_rows = keys.block, num_rows, num_rows + -num_rows % SUBLANES

    def block_of(b, j, length):
        """Block of step j: the last live one from there on."""
        return jnp.minimum(j, jnp.maximum(pl.cdiv(length[b], block) - 1, 0))

    def per_head(rows: int, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, rows, width), lambda b, h, j, length: (b, h, 0, 0))

    def pos_index(b, h, j, length):
        return b, h if pos is not None and pos.shape[1] > 1 else 0, 0, block_of(b, j, length)

    where = where_specs = None
    if pos is not None and q_pos is not None:
        at = jnp.pad(q_pos, ((0, 0), (0, num_rows - q_pos.shape[1])))[..., None]
        where = pos[:, :, None], jnp.broadcast_to(at, (batch, num_rows, LANES))
        where_specs = (
            pl.BlockSpec((None, None, 1, block), pos_index),
            pl.BlockSpec((None, num_rows, LANES), lambda b, h, j, length: (b, 0, 0)),
        )
    widths = (values.dim, LANES, LANES)
    k, v = keys.arrays(k), values.arrays(v)
    acc, top, total = pl.pallas_call(
        partial(_kernel, keys=keys, values=values, dtype=dtype, soft_cap=soft_cap, sliding_window=sliding_window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, pl.cdiv(num_slots, block)),
            in_specs=[
                jax.tree.map(lambda x: per_head(*x.shape[2:]), q),
                keys.specs(k, block_of),
                values.specs(v, block_of),
                where_specs,
            ],
            out_specs=[per_head(num_rows, width) for width in widths],
            scratch_shapes=[
                keys.scratch(num_rows),
                values.scratch(),
                tuple(pltpu.VMEM(x.shape, x.dtype) for x in jax.eval_shape(lambda: _start(values, num_rows))),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, heads, num_rows, width), jnp.float32) for width in widths],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(length, q, k, v, where)
    return acc[:, :, :wanted], top[:, :, :wanted, 0], total[:, :, :wanted, 0]


def padded(q: jax.Array) -> jax.Array:
    """Queries [B, K, R, D] in float32, with R a whole number of sublanes."""
    return jnp.pad(q.astype(jnp.float32), ((0, 0), (0, 0), (0, -q.shape[2] % SUBLANES), (0, 0)))


def product_dtype(*arrays: jax.Array) -> Any:
    """What to multiply in: float32 only if one of the arrays is."""
    return jnp.float32 if any(x.dtype == jnp.float32 for x in arrays) else jnp.bfloat16


def _kernel(
    length_ref, q_refs, k, v, where,  # i32[B], queries, blocks of rows, (i32[1, P], i32[R, 128]) or None
    acc_ref, max_ref, sum_ref,  # f32[R, D], f32[R, 128], f32[R, 128], revisited along the last axis of the grid
    k_scratch, v_scratch, state_refs,
    *, keys: Side, values: Side, dtype: Any, soft_cap: float | None, sliding_window: int | None,
):  # fmt: skip
    """Fold one block of slots into the state of online softmax."""
    j, num_rows = pl.program_id(2), max_ref.shape[0]
    live = length_ref[pl.program_id(0)] - j * keys.block  # tokens of this block that count

    @pl.when(j == 0)
    def _():
        _store(state_refs, _start(values, num_rows))

    @pl.when(live > 0)
    def _():
        q = jax.tree.map(lambda ref: ref[...], q_refs)
        keys.prepare(k, k_scratch, live, q)
        values.prepare(v, v_scratch, live)

        def fold(i, state):
            top, total, *sums = state
            shape = (num_rows, keys.tile)
            logits = capped(keys.read(k, k_scratch, i, live, dtype).dot(q), soft_cap)  # [R, T]
            if keys.places != values.places:
                logits = permute_lanes(logits, order_of(keys.places, values.places))
            token = i * keys.tile + tokens_of_lanes(lax.broadcasted_iota(jnp.int32, shape, 1), values.places)
            seen = token < live
            if where is not None:
                seen &= _visible(where, i, shape, values.places, sliding_window)
            logits = jnp.where(seen, logits, MASK_VALUE)
            new_top = jnp.maximum(top, logits.max(1, keepdims=True))  # [R, 128], equal lanes
            keep = jnp.exp(top - new_top)
            p = jnp.where(seen, jnp.exp(logits - repeat_lanes(new_top, keys.tile)), 0.0)
            sums = values.read(v, v_scratch, i, live, dtype).mix(keep, tuple(sums), p)
            return new_top, total * keep + fold_lanes(p), *sums

        num_tiles = jnp.minimum(pl.cdiv(live, keys.tile), keys.block // keys.tile)
        _store(state_refs, lax.fori_loop(0, num_tiles, fold, tuple(ref[...] for ref in state_refs)))

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        top, total, *sums = (ref[...] for ref in state_refs)
        acc_ref[...] = values.finish_mix(tuple(sums), num_rows)
        max_ref[...] = top
        sum_ref[...] = jnp.broadcast_to(total.sum(1, keepdims=True), total.shape)


def _start(values: Side, num_rows: int) -> tuple[jax.Array, ...]:
    """State before any slot: maximum [R, 128] with equal lanes, sum [R, 128] spread over lanes, sums of values."""
    shape = (num_rows, LANES)
    return jnp.full(shape, MASK_VALUE, jnp.float32), jnp.zeros(shape, jnp.float32), *values.zero_mix(num_rows)


def _store(refs, arrays) -> None:
    for ref, x in zip(refs, arrays, strict=True):
        ref[...] = x


def _visible(where, i, shape: tuple[int, int], places: int, sliding_window: int | None) -> jax.Array:
    """Which slots of tile i, in the order of `places`, each query sees by its position: bool[R, T]."""
    pos_ref, q_pos_ref = where
    here = pos_ref[:, pl.ds(pl.multiple_of(i * shape[1], LANES), shape[1])]  # [1, T]
    here = jnp.broadcast_to(here, shape)
    if places > 1:
        here = permute_lanes(here, order_of(1, places))
    at = repeat_lanes(q_pos_ref[...], shape[1])
    seen = (here >= 0) & (here <= at)
    return seen if sliding_window is None else seen & (here > at - sliding_window)
