"""Decode attention over packed rows on TPUs: split over rows, KV heads and blocks of slots.

Lengths arrive before the blocks do, so that blocks beyond a row's length are neither fetched (the index stays at the
last live one) nor computed. Inside a block, tiles of slots are steps of online softmax whose state stays in registers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.prefill.reference import MASK_VALUE, capped
from pallas_kernels.quantized_decode.block_sizes import tpu_sizes
from pallas_kernels.quantized_decode.tpu_side import Side, fold_lanes
from pallas_kernels.tpu_rows import LANES, SUBLANES, order_of, permute_lanes, repeat_lanes, tokens_of_lanes


def quantized_decode(
    q: jax.Array,
    k: Quantized,
    v: Quantized,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    k_format: Format,
    v_format: Format,
    soft_cap: float | None,
    sliding_window: int | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.quantized_decode`."""
    batch, heads, num_rows, _ = q.shape
    num_slots = k.codes.shape[2] if k_format.bits == 8 else k.codes.shape[2] * 32 // k_format.bits
    block, tile = tpu_sizes(num_slots, q.shape[-1], k_format, v_format)
    keys = Side(k_format, q.shape[-1], block, tile)
    values = Side(v_format, v.codes.shape[-1], block, tile)
    padding = -num_rows % SUBLANES
    rows = num_rows + padding

    def block_of(b, j, length):
        """Block of step j: the last live one from there on."""
        return jnp.minimum(j, jnp.maximum(pl.cdiv(length[b], block) - 1, 0))

    def per_head(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, rows, width), lambda b, h, j, length: (b, h, 0, 0))

    def pos_index(b, h, j, length):
        return b, h if pos is not None and pos.shape[1] > 1 else 0, 0, block_of(b, j, length)

    where = where_specs = None
    if pos is not None:
        at = jnp.pad(q_pos, ((0, 0), (0, padding)))[..., None]
        where = pos[:, :, None], jnp.broadcast_to(at, (batch, rows, LANES))
        where_specs = (
            pl.BlockSpec((None, None, 1, block), pos_index),
            pl.BlockSpec((None, rows, LANES), lambda b, h, j, length: (b, 0, 0)),
        )
    outputs = ((values.dim, LANES, LANES), jnp.float32)
    acc, top, total = pl.pallas_call(
        partial(_kernel, keys=keys, values=values, soft_cap=soft_cap, sliding_window=sliding_window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, pl.cdiv(num_slots, block)),
            in_specs=[per_head(keys.dim), keys.specs(k, block_of), values.specs(v, block_of), where_specs],
            out_specs=[per_head(width) for width in outputs[0]],
            scratch_shapes=[
                keys.scratch(rows),
                values.scratch(),
                tuple(pltpu.VMEM(x.shape, x.dtype) for x in jax.eval_shape(lambda: _start(values, rows))),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, heads, rows, width), outputs[1]) for width in outputs[0]],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="quantized_decode",
    )(length, jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0))), keys.arrays(k), values.arrays(v), where)
    return acc[:, :, :num_rows], top[:, :, :num_rows, 0], total[:, :, :num_rows, 0]


def _kernel(
    length_ref, q_ref, k, v, where,  # i32[B], [R, D], blocks of packed rows, (i32[1, P], i32[R, 128]) or None
    acc_ref, max_ref, sum_ref,  # f32[R, D], f32[R, 128], f32[R, 128], revisited along the last axis of the grid
    k_scratch, v_scratch, state_refs,
    *, keys: Side, values: Side, soft_cap: float | None, sliding_window: int | None,
):  # fmt: skip
    """Fold one block of slots into the state of online softmax."""
    j, num_rows = pl.program_id(2), q_ref.shape[0]
    live = length_ref[pl.program_id(0)] - j * keys.block  # tokens of this block that count
    dtype = jnp.float32 if q_ref.dtype == jnp.float32 else jnp.bfloat16

    @pl.when(j == 0)
    def _():
        _store(state_refs, _start(values, num_rows))

    @pl.when(live > 0)
    def _():
        q = q_ref[...].astype(jnp.float32)
        keys.prepare(k, k_scratch, live, q)
        values.prepare(v, v_scratch, live)

        def fold(i, state):
            top, total, *sums = state
            shape = (num_rows, keys.tile)
            logits = capped(keys.read(k, k_scratch, i, live, dtype).dot(q), soft_cap)  # [R, T]
            if keys.held_bits != values.held_bits:
                logits = permute_lanes(logits, order_of(keys.held_bits, values.held_bits))
            token = i * keys.tile + tokens_of_lanes(lax.broadcasted_iota(jnp.int32, shape, 1), values.held_bits)
            seen = token < live
            if where is not None:
                seen &= _visible(where, i, shape, values.held_bits, sliding_window)
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


def _visible(where, i, shape: tuple[int, int], bits: int, sliding_window: int | None) -> jax.Array:
    """Which slots of tile i, in the order of `bits`, each query sees by its position: bool[R, T]."""
    pos_ref, q_pos_ref = where
    here = pos_ref[:, pl.ds(pl.multiple_of(i * shape[1], LANES), shape[1])]  # [1, T]
    here = permute_lanes(jnp.broadcast_to(here, shape), order_of(8, bits))
    at = repeat_lanes(q_pos_ref[...], shape[1])
    seen = (here >= 0) & (here <= at)
    return seen if sliding_window is None else seen & (here > at - sliding_window)
