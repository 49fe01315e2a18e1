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
from pallas_kernels.prefill.reference import MASK_VALUE, capped

_LANES = 128


def prefill(q, k, v, start, *, soft_cap=None, sliding_window=None, interpret=False):
    """See `api.prefill`."""
    batch, heads, groups, num_queries, head_dim = q.shape
    block_q, block_k = _blocks(groups, num_queries, k.shape[2])
    q = _padded(q.astype(k.dtype), block_q)
    steps = _Steps(block_q, block_k, k.shape[2], sliding_window)
    rows = groups * block_q
    kernel = functools.partial(_prefill_kernel, steps=steps, soft_cap=soft_cap)
    q_spec = pl.BlockSpec((None, None, groups, block_q, head_dim), lambda b, h, i, j, start: (b, h, 0, i, 0))
    k_spec = pl.BlockSpec(
        (None, None, block_k, head_dim), lambda b, h, i, j, start: (b, h, steps.clip(start[b], i, j), 0)
    )
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
                pltpu.VMEM((rows, _LANES), jnp.float32),
                pltpu.VMEM((rows, _LANES), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), one, one],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        interpret=interpret,
        name="prefill_tpu",
    )(start.astype(jnp.int32), q, k, v)
    return acc[:, :, :, :num_queries], top[:, :, :, :num_queries, 0], total[:, :, :, :num_queries, 0]


def mass(q, k, lse, start, length, *, soft_cap=None, sliding_window=None, interpret=False):
    """See `api.mass`."""
    batch, heads, groups, num_queries, head_dim = q.shape
    block_q, block_k = _blocks(groups, num_queries, k.shape[2])
    q, lse = _padded(q.astype(k.dtype), block_q), _padded(lse[..., None].astype(jnp.float32), block_q)
    steps = _Steps(block_q, block_k, k.shape[2], sliding_window)

    def queries(b, h, j, i, start, length):
        return b, h, 0, i, 0

    out = pl.pallas_call(
        functools.partial(_mass_kernel, steps=steps, soft_cap=soft_cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, steps.num_key_blocks, q.shape[3] // block_q),
            in_specs=[
                pl.BlockSpec((None, None, groups, block_q, head_dim), queries),
                pl.BlockSpec((None, None, block_k, head_dim), lambda b, h, j, i, start, length: (b, h, j, 0)),
                pl.BlockSpec((None, None, groups, block_q, 1), queries),
            ],
            out_specs=pl.BlockSpec((None, None, 1, block_k), lambda b, h, j, i, start, length: (b, h, 0, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, 1, k.shape[2]), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        interpret=interpret,
        name="mass_tpu",
    )(start.astype(jnp.int32), length.astype(jnp.int32), q, k, lse)
    return out[:, :, 0]


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
    start_ref, q_ref, k_ref, v_ref,  # [B] [G,Q,D] [P,D] [P,D]
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
        slot = j * steps.block_k + lax.broadcasted_iota(jnp.int32, v_ref.shape, 0)
        v = jnp.where(slot < steps.num_slots, v_ref[...], 0)  # beyond the end there may be anything
        pv = lax.dot_general(
            p.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32, precision=_exact(v)
        )
        acc_scratch[...] = acc_scratch[...] * keep + pv
        sum_scratch[...] = jnp.broadcast_to(sum_scratch[:, :1] * keep + p.sum(-1, keepdims=True), sum_scratch.shape)
        max_scratch[...] = jnp.broadcast_to(new, max_scratch.shape)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        acc_ref[...] = acc_scratch[...].reshape(acc_ref.shape)
        max_ref[...] = max_scratch[:, :1].reshape(max_ref.shape)
        sum_ref[...] = sum_scratch[:, :1].reshape(sum_ref.shape)


def _mass_kernel(start_ref, length_ref, q_ref, k_ref, lse_ref, out_ref, *, steps, soft_cap):
    """Add what one query block gives to one key block."""  # refs: [B] [B] [G,Q,D] [P,D] [G,Q,1] -> [1,P]
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    first, last = steps.range(start_ref[b], i)

    @pl.when((j >= first) & (j <= last) & (i * steps.block_q < length_ref[b]))
    def _():
        logits = capped(_logits(q_ref, k_ref), soft_cap)
        t = i * steps.block_q + lax.broadcasted_iota(jnp.int32, logits.shape, 0) % steps.block_q
        live = steps.live(start_ref[b], i, j, logits.shape) & (t < length_ref[b])
        probs = jnp.where(live, jnp.exp(logits - lse_ref[...].reshape(-1, 1)), 0.0)
        out_ref[...] += probs.sum(0, keepdims=True)


def _logits(q_ref, k_ref) -> jax.Array:
    """[G, Q, D] x [P, D] -> f32[G*Q, P]."""
    q, k = q_ref[...].reshape(-1, q_ref.shape[-1]), k_ref[...]
    return lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=_exact(k))


def _exact(x: jax.Array) -> lax.Precision | None:
    """Float32 operands would be rounded to bfloat16 by default."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _blocks(groups: int, num_queries: int, num_slots: int) -> tuple[int, int]:
    """Query tokens and slots of a block; sublanes come in eights, in sixteens at 16 bits."""
    block_q = min(max(TPU_ROWS // groups // 16 * 16, 16), math.ceil(num_queries / 16) * 16)
    return block_q, min(TPU_KEY_BLOCK, math.ceil(num_slots / _LANES) * _LANES)


def _padded(x: jax.Array, block_q: int) -> jax.Array:
    """Pad the queries of [B, K, G, T, D] to whole blocks."""
    return jnp.pad(x, ((0, 0),) * 3 + ((0, -x.shape[3] % block_q), (0, 0)))
