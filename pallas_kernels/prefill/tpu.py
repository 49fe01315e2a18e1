"""Prefill on TPU: online softmax over key blocks, and the mass pass, in Pallas.

The grid walks (row, KV head, query block, key block); key blocks that the causal mask or the sliding window hides are
neither computed nor fetched, because their index map stays on the last visible block. The queries of a group's heads
are rows of one product.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.prefill.block_sizes import TPU_KEY_BLOCK, TPU_ROWS
from pallas_kernels.prefill.reach import query_blocks
from pallas_kernels.prefill.reference import MASK_VALUE, capped, in_two_passes
from pallas_kernels.tpu_rows import LANES, SUBLANES, refuse_float16, tokens_along_lanes


def prefill(q, k, v, start, *, soft_cap=None, sliding_window=None, interpret=False):
    """See `api.prefill`."""
    refuse_float16(k, v)
    batch, heads, groups, num_queries, head_dim = q.shape
    block_q, block_k = _blocks(groups, num_queries, k.shape[2])
    q = _padded(q.astype(k.dtype), block_q)
    steps = _Steps(block_q, block_k, k.shape[2], sliding_window)
    rows = groups * block_q
    kernel = functools.partial(_prefill_kernel, steps=steps, soft_cap=soft_cap)
    q_spec = pl.BlockSpec((None, None, groups, block_q, head_dim), lambda b, h, i, j, start: (b, h, 0, i, 0))
    k_spec = _rows_spec(k, block_k, lambda b, h, i, j, start: (b, h, steps.clip(start[b], i, j)))
    one_spec = pl.BlockSpec((None, None, groups, block_q, 1), lambda b, h, i, j, start: (b, h, 0, i, 0))
    one = jax.ShapeDtypeStruct((*q.shape[:4], 1), jnp.float32)
    acc, top, total = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, q.shape[3] // block_q, steps.num_key_blocks),
            in_specs=[q_spec, k_spec, k_spec],
            out_specs=[q_spec, one_spec, one_spec],
            scratch_shapes=[
                pltpu.VMEM((rows, head_dim), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), one, one],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        interpret=interpret,
        name="prefill",
    )(start.astype(jnp.int32), q, _rows(k), _rows(v))
    return acc[:, :, :, :num_queries], top[:, :, :, :num_queries, 0], total[:, :, :, :num_queries, 0]


def probe_mass(q, k, lse, at, *, soft_cap=None, sliding_window=None, interpret=False):
    """See `api.probe_mass`."""
    refuse_float16(k)
    batch, heads, groups, num_queries, head_dim = q.shape
    num_slots = k.shape[2]
    block_q, block_k = _blocks(groups, num_queries, num_slots)
    at = jnp.pad(at.astype(jnp.int32), ((0, 0), (0, -num_queries % block_q)), constant_values=-1)
    num_blocks, rows = at.shape[1] // block_q, groups * block_q
    at_rows = jnp.tile(at.reshape(batch, num_blocks, 1, block_q), groups)
    lse = _padded(lse[..., None].astype(jnp.float32), block_q)
    lse_rows = lse.reshape(batch, heads, groups, num_blocks, block_q).swapaxes(2, 3)
    first, end = query_blocks(at, block_q, block_k, num_slots, sliding_window)

    def seen(b, j, i, first, end):
        """The block of queries to have at step i: a hidden one is not fetched anew."""
        return jnp.clip(i, first[b, j], jnp.maximum(end[b, j] - 1, first[b, j]))

    def keys(b, h, j, i, first, end):
        return b, h, jnp.where(first[b, j] < end[b, j], j, 0)

    one_row = (None, None, None, 1, rows)
    out = pl.pallas_call(
        functools.partial(_mass_kernel, block_k=block_k, soft_cap=soft_cap, sliding_window=sliding_window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, first.shape[1], num_blocks),
            in_specs=[
                pl.BlockSpec(
                    (None, None, groups, block_q, head_dim),
                    lambda b, h, j, i, *ends: (b, h, 0, seen(b, j, i, *ends), 0),
                ),
                _rows_spec(k, block_k, keys),
                pl.BlockSpec(one_row, lambda b, h, j, i, *ends: (b, h, seen(b, j, i, *ends), 0, 0)),
                pl.BlockSpec(one_row[1:], lambda b, h, j, i, *ends: (b, seen(b, j, i, *ends), 0, 0)),
            ],
            out_specs=pl.BlockSpec((None, None, 1, block_k), lambda b, h, j, i, *ends: (b, h, 0, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, 1, num_slots), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        interpret=interpret,
        name="mass",
    )(
        first,
        end,
        _padded(q.astype(k.dtype), block_q),
        _rows(k),
        lse_rows.reshape(batch, heads, num_blocks, 1, rows),
        at_rows,
    )
    return out[:, :, 0]


prefill_with_mass = in_two_passes(prefill, probe_mass)


class _Steps:
    """Which key blocks the query block i of a row sees."""

    def __init__(self, block_q: int, block_k: int, num_slots: int, sliding_window: int | None) -> None:
        self.block_q, self.block_k, self.num_slots, self.sliding_window = block_q, block_k, num_slots, sliding_window
        self.num_key_blocks = pl.cdiv(num_slots, block_k)

    def range(self, start: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First and last visible key block."""
        last = jnp.minimum(start + (i + 1) * self.block_q, self.num_slots) - 1
        first = jnp.int32(0)
        if self.sliding_window is not None:
            first = jnp.maximum(start + i * self.block_q - self.sliding_window + 1, 0) // self.block_k
        return first, last // self.block_k

    def clip(self, start: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """The key block to fetch at step j: a hidden one is not fetched anew."""
        first, last = self.range(start, i)
        return jnp.clip(j, first, last)

    def live(self, start: jax.Array, i: jax.Array, j: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """Which slots [P] of block j the rows [G * Q] of query block i see."""
        slot = j * self.block_k + lax.broadcasted_iota(jnp.int32, shape, 1)
        pos = start + i * self.block_q + lax.broadcasted_iota(jnp.int32, shape, 0) % self.block_q
        live = (slot <= pos) & (slot < self.num_slots)
        return live if self.sliding_window is None else live & (slot > pos - self.sliding_window)


def _prefill_kernel(
    start_ref, q_ref, k_ref, v_ref,  # [B] [G,Q,D] [P,D] or [D,P] as k
    acc_ref, max_ref, sum_ref,  # [G,Q,D] [G,Q,1] [G,Q,1]
    acc_scratch, max_scratch, sum_scratch,  # [G*Q,D] [G*Q,128] [G*Q,128]
    *, steps, soft_cap,
):  # fmt: skip
    """One step of online softmax over block_k slots."""
    i, j, start = pl.program_id(2), pl.program_id(3), start_ref[pl.program_id(0)]

    @pl.when(j == 0)
    def _():
        acc_scratch[...] = jnp.zeros_like(acc_scratch)
        max_scratch[...] = jnp.full_like(max_scratch, MASK_VALUE)
        sum_scratch[...] = jnp.zeros_like(sum_scratch)

    first, last = steps.range(start, i)

    @pl.when((j >= first) & (j <= last))
    def _():
        logits = capped(_logits(q_ref, k_ref), soft_cap)  # [G*Q, P]
        live = steps.live(start, i, j, logits.shape)
        logits = jnp.where(live, logits, MASK_VALUE)
        old = max_scratch[:, :1]
        new = jnp.maximum(old, logits.max(-1, keepdims=True))
        keep, p = jnp.exp(old - new), jnp.where(live, jnp.exp(logits - new), 0.0)
        along = 1 if tokens_along_lanes(q_ref.shape[-1]) else 0
        slot = j * steps.block_k + lax.broadcasted_iota(jnp.int32, v_ref.shape, along)
        v = jnp.where(slot < steps.num_slots, v_ref[...], 0)  # beyond the end there may be anything
        pv = lax.dot_general(
            p.astype(v.dtype), v, (((1,), (along,)), ((), ())), preferred_element_type=jnp.float32, precision=_exact(v)
        )
        acc_scratch[...] = acc_scratch[...] * keep + pv
        sum_scratch[...] = jnp.broadcast_to(sum_scratch[:, :1] * keep + p.sum(-1, keepdims=True), sum_scratch.shape)
        max_scratch[...] = jnp.broadcast_to(new, max_scratch.shape)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        acc_ref[...] = acc_scratch[...].reshape(acc_ref.shape)
        max_ref[...] = max_scratch[:, :1].reshape(max_ref.shape)
        sum_ref[...] = sum_scratch[:, :1].reshape(sum_ref.shape)


def _mass_kernel(first_ref, end_ref, q_ref, k_ref, lse_ref, at_ref, out_ref, *, block_k, soft_cap, sliding_window):
    """Add what one block of queries gives to one block of keys."""
    # refs: [B,J] [B,J] [G,Q,D] [P,D] or [D,P] [1,G*Q] [1,G*Q] -> [1,P]
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when((i >= first_ref[b, j]) & (i < end_ref[b, j]))
    def _():
        logits = capped(_logits(q_ref, k_ref), soft_cap)  # [G*Q, P]
        slot = j * block_k + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        at = _column(at_ref)
        live = slot <= at if sliding_window is None else (slot <= at) & (slot > at - sliding_window)
        probs = jnp.where(live, jnp.exp(logits - _column(lse_ref)), 0.0)
        out_ref[...] += probs.sum(0, keepdims=True)


def _column(ref) -> jax.Array:
    """[1, R] -> [R, 1]."""
    return jnp.broadcast_to(ref[...], (SUBLANES, ref.shape[1])).T[:, :1]


def _logits(q_ref, k_ref) -> jax.Array:
    """[G, Q, D] x [P, D] or [D, P] -> f32[G*Q, P]."""
    q, k = q_ref[...].reshape(-1, q_ref.shape[-1]), k_ref[...]
    contract = ((1,), (0 if tokens_along_lanes(q.shape[1]) else 1,))
    return lax.dot_general(q, k, (contract, ((), ())), preferred_element_type=jnp.float32, precision=_exact(k))


def _exact(x: jax.Array) -> lax.Precision | None:
    """Float32 operands would be rounded to bfloat16 by default."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _blocks(groups: int, num_queries: int, num_slots: int) -> tuple[int, int]:
    """Query tokens and slots of a block; sublanes come in eights, in sixteens at 16 bits."""
    block_q = min(max(TPU_ROWS // groups // 16 * 16, 16), math.ceil(num_queries / 16) * 16)
    return block_q, min(TPU_KEY_BLOCK, math.ceil(num_slots / LANES) * LANES)


def _rows(x: jax.Array) -> jax.Array:
    """Keys or values [B, K, S, D] with that axis last which XLA stores along lanes, so that nothing is copied."""
    return x.swapaxes(-1, -2) if tokens_along_lanes(x.shape[-1]) else x


def _rows_spec(x: jax.Array, block_k: int, index) -> pl.BlockSpec:
    """Blocks of `_rows(x)`: `index` gives row, head and block."""
    dim = x.shape[-1]
    if tokens_along_lanes(dim):
        return pl.BlockSpec((None, None, dim, block_k), lambda *at: (*index(*at)[:2], 0, index(*at)[2]))
    return pl.BlockSpec((None, None, block_k, dim), lambda *at: (*index(*at), 0))


def _padded(x: jax.Array, block_q: int) -> jax.Array:
    """Pad the queries of [B, K, G, T, D] to whole blocks."""
    return jnp.pad(x, ((0, 0),) * 3 + ((0, -x.shape[3] % block_q), (0, 0)))
