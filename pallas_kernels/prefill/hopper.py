"""Prefill in Pallas Mosaic GPU, Hopper and newer: online softmax over key blocks that the copy engine brings.

The queries of a group's heads are rows of one product, [G * T, D]. A block of up to two warpgroups holds 64 rows each
and shares the keys and values that a third warpgroup fetches; while one computes its softmax, the matrix unit serves
the other. Key blocks that the causal mask and the sliding window hide are not fetched, and only those that they cut are
masked.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    LOG2E,
    ROWS,
    WARPGROUP_ROWS,
    Blocks,
    Machine,
    Ring,
    along,
    operand,
    require_hopper,
    require_operands,
    tanh,
)
from pallas_kernels.prefill.block_sizes import HOPPER_REGISTERS, HOPPER_STAGES, hopper_key_block
from pallas_kernels.prefill.hopper_mass import probe_mass
from pallas_kernels.prefill.reference import MASK_VALUE, in_two_passes

__all__ = ["prefill", "prefill_with_mass", "probe_mass"]


@dataclasses.dataclass(frozen=True)
class _Plan(Blocks):
    """What the kernel must know of a call; its rows are the queries of all heads of a group."""

    num_queries: int
    num_slots: int
    block_k: int
    soft_cap: float | None
    sliding_window: int | None

    def key_blocks(self, start: jax.Array, i: jax.Array) -> tuple[jax.Array, ...]:
        """Key blocks that the rows of block i see: the first, the first and one past the last seen whole, the end."""
        top = i * self.block
        bottom = jnp.minimum(top + self.block, self.num_rows) - 1
        alone = lax.div(top, self.num_queries) == lax.div(bottom, self.num_queries)  # rows of one head are in order
        low = start + jnp.where(alone, lax.rem(top, self.num_queries), 0)
        high = start + jnp.where(alone, lax.rem(bottom, self.num_queries), self.num_queries - 1)
        end = jnp.minimum(lax.div(high, self.block_k) + 1, pl.cdiv(self.num_slots, self.block_k))
        first = whole = jnp.int32(0)
        if self.sliding_window is not None:
            first = jnp.minimum(lax.div(jnp.maximum(low - self.sliding_window + 1, 0), self.block_k), end)
            hidden = jnp.maximum(high - self.sliding_window + 1, 0)
            whole = jnp.clip(lax.div(hidden + self.block_k - 1, self.block_k), first, end)
        cut = jnp.minimum(lax.div(low + 1, self.block_k), self.num_slots // self.block_k)
        return first, whole, jnp.clip(cut, whole, end), end


def prefill(q, k, v, start, *, soft_cap=None, sliding_window=None, interpret=False):
    """See `api.prefill`."""
    require_hopper(interpret)
    batch, heads, groups, num_queries, dim = q.shape
    require_operands(keys=k, values=v)
    sizes = (groups * num_queries, num_queries, k.shape[2], hopper_key_block(dim))
    plan = _Plan(Machine(interpret), *sizes, soft_cap, sliding_window)
    rows = q.astype(k.dtype).reshape(batch, heads, plan.num_rows, dim)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, plan.num_blocks * plan.block - plan.num_rows), (0, 0)))
    acc, top, total = (x[:, :, : plan.num_rows] for x in _call(plan, rows, k, v, start.astype(jnp.int32)))
    return acc.reshape(q.shape), top.reshape(q.shape[:4]), total.reshape(q.shape[:4])


prefill_with_mass = in_two_passes(prefill, probe_mass)


def _call(plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> tuple[jax.Array, ...]:
    """Run the kernel on q [B, K, rows, D] of whole blocks: acc like q, max and sum [B, K, rows], f32."""
    batch, heads, _, dim = q.shape
    state = (
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    )
    scratch = (
        operand((plan.readers, WARPGROUP_ROWS, dim), q.dtype),
        plgpu.Barrier(num_barriers=plan.readers),
        *(
            Ring.scratch(HOPPER_STAGES, plan.readers, operand((HOPPER_STAGES, plan.block_k, dim), x.dtype))
            for x in (k, v)
        ),
    )
    grid = {"b": batch, "h": heads, "i": plan.num_blocks}
    kernel = functools.partial(_kernel, plan)
    run = plan.machine.kernel(kernel, state, grid, scratch, warpgroups=plan.readers + 1, approx_math=True)
    return run(q, k, v, start)


def _kernel(
    plan,
    q_gmem, k_gmem, v_gmem, start_gmem,  # [B,K,rows,D] [B,K,S,D] [B,K,S,D] [B]
    acc_gmem, top_gmem, sum_gmem,  # [B,K,rows,D] [B,K,rows] [B,K,rows]
    q_smem, q_barrier, k_ring, v_ring,  # [readers,64,D]
):  # fmt: skip
    """Attend from one block of query rows to all that they see."""
    b, h, wg = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
    i = plan.num_blocks - 1 - lax.axis_index("i")  # the longest first
    start, (k_ring, v_ring) = start_gmem[b], (Ring(*k_ring), Ring(*v_ring))
    first, whole, cut, end = plan.key_blocks(start, i)

    @pl.when(wg == plan.readers)
    def _():
        plan.machine.claim_registers(plan.readers, HOPPER_REGISTERS, fetches=True)

        @pl.loop(0, end - first)
        def _(step):
            slots = pl.ds((first + step) * plan.block_k, plan.block_k)
            k_ring.fill(step, k_gmem.at[b, h, slots])
            v_ring.fill(step, v_gmem.at[b, h, slots])

        for ring in (k_ring, v_ring):
            ring.drain(end - first)

    @pl.when(wg < plan.readers)
    def _():
        plan.machine.claim_registers(plan.readers, HOPPER_REGISTERS, fetches=False)
        own = pl.ds(i * plan.block + wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(q_gmem.at[b, h, own], q_smem.at[wg], q_barrier.at[wg])
        plgpu.barrier_wait(q_barrier.at[wg])
        row = i * plan.block + wg * WARPGROUP_ROWS + plan.machine.iota((WARPGROUP_ROWS,), 0, ROWS)
        pos = start + lax.rem(row, jnp.full_like(row, plan.num_queries))
        walk = functools.partial(_step, plan, q_smem.at[wg], k_ring, v_ring, first, pos)
        carry = (
            plan.machine.full((WARPGROUP_ROWS, q_smem.shape[-1]), 0.0),
            plan.machine.full((WARPGROUP_ROWS,), MASK_VALUE * LOG2E, ROWS),
            plan.machine.full((WARPGROUP_ROWS,), 0.0, ROWS),
        )
        if plan.sliding_window is not None:
            carry = lax.fori_loop(first, whole, functools.partial(walk, masked=True), carry)
        carry = lax.fori_loop(whole, cut, functools.partial(walk, masked=False), carry)
        acc, top, total = lax.fori_loop(cut, end, functools.partial(walk, masked=True), carry)
        acc_gmem[b, h, own] = acc
        top_gmem[b, h, own] = top * (1 / LOG2E)
        sum_gmem[b, h, own] = total


def _step(plan, q_smem, k_ring, v_ring, first, pos, j, carry, *, masked):
    """Fold key block j into the state of a warpgroup's rows; the maximum is in units of log 2."""
    acc, top, total = carry
    (k_smem,) = k_ring.take(j - first)
    logits = plan.machine.dot(plan.machine.full((WARPGROUP_ROWS, plan.block_k), 0.0), q_smem, k_smem)
    k_ring.release(j - first)
    if plan.soft_cap is not None:
        logits = plan.soft_cap * tanh(logits * (1 / plan.soft_cap))
    if masked:
        logits = _masked(plan, logits, j, pos)
    new_top = jnp.maximum(top, logits.max(1) * LOG2E)
    keep = jnp.exp2(top - new_top)
    p = jnp.exp2(logits * LOG2E - along(new_top, logits, 0))
    total = total * keep + p.sum(1)
    (v_smem,) = v_ring.take(j - first)
    acc = plan.machine.dot(acc * along(keep, acc, 0), p.astype(v_smem.dtype), v_smem, contract=0)
    v_ring.release(j - first)
    return acc, new_top, total


def _masked(plan: _Plan, logits: jax.Array, j: jax.Array, pos: jax.Array) -> jax.Array:
    """Push logits that rows at `pos` do not see so far below any maximum that p becomes 0, even in a dead row."""
    slot = j * plan.block_k + plan.machine.iota(logits.shape, 1)
    last = along(jnp.minimum(pos, plan.num_slots - 1), logits, 0)
    logits = jnp.where(slot <= last, logits, 2 * MASK_VALUE)
    if plan.sliding_window is not None:
        logits = jnp.where(slot > along(pos - plan.sliding_window, logits, 0), logits, 2 * MASK_VALUE)
    return logits
