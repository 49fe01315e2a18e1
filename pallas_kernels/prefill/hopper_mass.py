"""Mass in Pallas Mosaic GPU, Hopper and newer: keys stay in shared memory, blocks of queries pass by.

A block of up to two warpgroups holds 64 keys each; another warpgroup fetches the queries of each head of the group,
with their softmax denominators and the slots where they stand, block by block. Blocks of queries before the first and
after the last that sees any of the keys are not fetched.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    COLUMNS,
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
from pallas_kernels.prefill.block_sizes import HOPPER_QUERY_BLOCK, HOPPER_REGISTERS, HOPPER_STAGES
from pallas_kernels.prefill.reach import query_blocks


@dataclasses.dataclass(frozen=True)
class _Plan(Blocks):
    """What the kernel must know of a call; its rows are slots."""

    block_q: int
    soft_cap: float | None
    sliding_window: int | None


def probe_mass(q, k, lse, at, *, soft_cap=None, sliding_window=None, interpret=False):
    """See `api.probe_mass`."""
    require_hopper(interpret)
    require_operands(keys=k)
    block_q = min(HOPPER_QUERY_BLOCK, pl.cdiv(q.shape[3], 32) * 32)  # of lse, no less than 128 bytes are copied
    plan = _Plan(Machine(interpret), k.shape[2], block_q, soft_cap, sliding_window)
    pad = (0, -q.shape[3] % block_q)
    q = jnp.pad(q.astype(k.dtype), (*((0, 0),) * 3, pad, (0, 0)))
    lse = jnp.pad(lse.astype(jnp.float32), (*((0, 0),) * 3, pad))
    at = jnp.pad(at.astype(jnp.int32), ((0, 0), pad), constant_values=-1)
    return _call(plan, q, k, lse, at)[:, :, : k.shape[2]]


def _call(plan: _Plan, q: jax.Array, k: jax.Array, lse: jax.Array, at: jax.Array) -> jax.Array:
    """Run the kernel on whole blocks of queries: f32[B, K, slots of whole blocks]."""
    batch, heads, _, dim = k.shape
    stages, block_q = HOPPER_STAGES, plan.block_q
    scratch = (
        operand((plan.readers, WARPGROUP_ROWS, dim), k.dtype),
        plgpu.Barrier(num_barriers=plan.readers),
        Ring.scratch(
            stages,
            plan.readers,
            operand((stages, block_q, dim), q.dtype),
            plgpu.SMEM((stages, block_q), jnp.float32),
            plgpu.SMEM((stages, block_q), jnp.int32),
        ),
    )
    grid = {"b": batch, "h": heads, "j": plan.num_blocks}
    out = jax.ShapeDtypeStruct((batch, heads, plan.num_blocks * plan.block), jnp.float32)
    kernel = functools.partial(_kernel, plan)
    run = plan.machine.kernel(kernel, out, grid, scratch, warpgroups=plan.readers + 1, approx_math=True)
    reach = query_blocks(at, block_q, plan.block, plan.num_rows, plan.sliding_window)
    return run(q, k, lse, at, *reach)


def _kernel(
    plan,
    q_gmem, k_gmem, lse_gmem, at_gmem, first_gmem, end_gmem,  # [B,K,G,T,D] [B,K,S,D] [B,K,G,T] [B,T] [B,J] [B,J]
    out_gmem,  # [B,K,S]
    k_smem, k_barrier, ring,  # [readers,64,D]
):  # fmt: skip
    """Sum what one block of slots receives from all queries of its KV head."""
    b, h, j, wg = (lax.axis_index(name) for name in ("b", "h", "j", "wg"))
    ring, first = Ring(*ring), first_gmem[b, j]
    num_blocks = end_gmem[b, j] - first
    steps = num_blocks * q_gmem.shape[2]

    @pl.when(wg == plan.readers)
    def _():
        plan.machine.claim_registers(plan.readers, HOPPER_REGISTERS, fetches=True)

        @pl.loop(0, steps)
        def _(step):
            g, t = lax.div(step, num_blocks), pl.ds((first + lax.rem(step, num_blocks)) * plan.block_q, plan.block_q)
            ring.fill(step, q_gmem.at[b, h, g, t], lse_gmem.at[b, h, g, t], at_gmem.at[b, t])

        ring.drain(steps)

    @pl.when(wg < plan.readers)
    def _():
        plan.machine.claim_registers(plan.readers, HOPPER_REGISTERS, fetches=False)
        own = pl.ds(j * plan.block + wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(k_gmem.at[b, h, own], k_smem.at[wg], k_barrier.at[wg])
        plgpu.barrier_wait(k_barrier.at[wg])
        slot = j * plan.block + wg * WARPGROUP_ROWS + plan.machine.iota((WARPGROUP_ROWS,), 0, ROWS)
        step = functools.partial(_step, plan, k_smem.at[wg], slot, ring)
        out_gmem[b, h, own] = lax.fori_loop(0, steps, step, plan.machine.full((WARPGROUP_ROWS,), 0.0, ROWS))


def _step(plan, k_smem, slot, ring, step, total):
    """Add what a warpgroup's 64 slots receive from a block of queries."""
    machine = plan.machine
    q_smem, lse_smem, at_smem = ring.take(step)
    logits = machine.dot(machine.full((WARPGROUP_ROWS, plan.block_q), 0.0), k_smem, q_smem)
    lse, at = machine.load(lse_smem, COLUMNS), along(machine.load(at_smem, COLUMNS), logits, 1)
    ring.release(step)
    if plan.soft_cap is not None:
        logits = plan.soft_cap * tanh(logits * (1 / plan.soft_cap))
    slot = along(slot, logits, 0)
    live = slot <= at
    if plan.sliding_window is not None:
        live = live & (slot > at - plan.sliding_window)
    return total + jnp.where(live, jnp.exp2(logits * LOG2E - along(lse * LOG2E, logits, 1)), 0.0).sum(1)
