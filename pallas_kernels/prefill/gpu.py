"""Prefill on GPUs in Triton, Ampere and newer: online softmax over key blocks, and the mass pass.

A program holds one block of queries of one query head (prefill), or one block of keys of one KV head (mass), and walks
only the blocks that the causal mask and the sliding window leave.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_calls
from pallas_kernels.prefill.block_sizes import gpu_blocks
from pallas_kernels.prefill.reach import query_blocks
from pallas_kernels.prefill.reference import MASK_VALUE, in_two_passes
from pallas_kernels.triton_products import precise_dot

_DEAD = tl.constexpr(MASK_VALUE)


def prefill(q, k, v, start, *, soft_cap=None, sliding_window=None, interpret=False):
    """See `api.prefill`."""
    batch, heads, groups, num_queries, _ = q.shape
    sizes = _sizes(q, k, soft_cap, sliding_window)
    blocks = gpu_blocks(num_queries, sizes["padded"], k.dtype.itemsize)
    rows = jax.ShapeDtypeStruct(q.shape[:4], jnp.float32)
    acc, top, total = triton_calls.call(
        _prefill,
        (q.astype(k.dtype), k, v, start.astype(jnp.int32)),
        [jax.ShapeDtypeStruct(q.shape, jnp.float32), rows, rows],
        (triton.cdiv(num_queries, blocks.queries), batch * heads * groups),
        {**sizes, "block_q": blocks.queries, "block_k": blocks.slots},
        interpret=interpret,
        num_stages=blocks.stages,
    )
    return acc, top, total


def probe_mass(q, k, lse, at, *, soft_cap=None, sliding_window=None, interpret=False):
    """See `api.probe_mass`."""
    batch, heads, _, num_queries, _ = q.shape
    sizes = _sizes(q, k, soft_cap, sliding_window)
    blocks = gpu_blocks(num_queries, sizes["padded"], k.dtype.itemsize)
    at = at.astype(jnp.int32)
    reach = query_blocks(at, blocks.queries, blocks.slots, k.shape[2], sliding_window)
    (out,) = triton_calls.call(
        _mass,
        (q.astype(k.dtype), k, lse.astype(jnp.float32), at, *reach),
        [jax.ShapeDtypeStruct(k.shape[:3], jnp.float32)],
        (triton.cdiv(k.shape[2], blocks.slots), batch * heads),
        {**sizes, "block_q": blocks.queries, "block_k": blocks.slots},
        interpret=interpret,
        num_stages=blocks.stages,
    )
    return out


prefill_with_mass = in_two_passes(prefill, probe_mass)


def _sizes(q: jax.Array, k: jax.Array, soft_cap: float | None, sliding_window: int | None) -> dict:
    return {
        "num_heads": q.shape[1],
        "groups": q.shape[2],
        "num_queries": q.shape[3],
        "num_slots": k.shape[2],
        "dim": q.shape[4],
        "padded": max(triton.next_power_of_2(q.shape[4]), 16),
        "soft_cap": soft_cap or 0.0,
        "sliding_window": sliding_window or 0,
    }


@triton.jit
def _prefill(
    q_ptr, k_ptr, v_ptr, start_ptr,  # [B, K, G, T, D] [B, K, S, D] [B, K, S, D] [B]
    acc_ptr, top_ptr, total_ptr,  # [B, K, G, T, D] [B, K, G, T] [B, K, G, T]
    num_heads: tl.constexpr, groups: tl.constexpr, num_queries: tl.constexpr, num_slots: tl.constexpr,
    dim: tl.constexpr, padded: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Attend from one block of queries of one head to all that it sees."""
    query_head = tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + query_head // (groups * num_heads))
    t = tl.program_id(0) * block_q + tl.arange(0, block_q)
    channel = tl.arange(0, padded)
    row = query_head * num_queries + t
    q_mask = (t < num_queries)[:, None] & (channel < dim)[None, :]
    q = tl.load(q_ptr + row[:, None] * dim + channel[None, :], mask=q_mask, other=0.0)
    base = query_head // groups * num_slots
    acc = tl.zeros((block_q, padded), tl.float32)
    top, total = tl.full((block_q,), _DEAD, tl.float32), tl.zeros((block_q,), tl.float32)
    first, last = 0, tl.minimum(start + (tl.program_id(0) + 1) * block_q, num_slots)
    if sliding_window > 0:
        first = tl.maximum(start + tl.program_id(0) * block_q - sliding_window + 1, 0) // block_k * block_k
    for at in tl.range(first, last, block_k):
        slot = at + tl.arange(0, block_k)
        mask = (slot < num_slots)[:, None] & (channel < dim)[None, :]
        where = (base + slot)[:, None] * dim + channel[None, :]
        k = tl.load(k_ptr + where, mask=mask, other=0.0)
        logits = precise_dot(q, tl.trans(k))
        if soft_cap > 0:
            logits = soft_cap * _tanh(logits / soft_cap)
        live = _live(start + t, slot, num_slots, sliding_window)
        logits = tl.where(live, logits, _DEAD)
        most = tl.maximum(top, tl.max(logits, 1))
        keep = tl.exp(top - most)
        p = tl.where(live, tl.exp(logits - most[:, None]), 0.0)
        v = tl.load(v_ptr + where, mask=mask, other=0.0)
        acc = acc * keep[:, None] + precise_dot(p.to(v.dtype), v)
        total = total * keep + tl.sum(p, 1)
        top = most
    tl.store(acc_ptr + row[:, None] * dim + channel[None, :], acc, mask=q_mask)
    tl.store(top_ptr + row, top, mask=t < num_queries)
    tl.store(total_ptr + row, total, mask=t < num_queries)


@triton.jit
def _mass(
    q_ptr, k_ptr, lse_ptr, at_ptr, first_ptr, end_ptr,  # [B, K, G, T, D] [B, K, S, D] [B, K, G, T] [B, T] [B, J] [B, J]
    out_ptr,  # [B, K, S]
    num_heads: tl.constexpr, groups: tl.constexpr, num_queries: tl.constexpr, num_slots: tl.constexpr,
    dim: tl.constexpr, padded: tl.constexpr, soft_cap: tl.constexpr, sliding_window: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Sum the probabilities that one block of keys receives from all queries of its heads."""
    head = tl.program_id(1).to(tl.int64)
    batch = head // num_heads
    block = batch * tl.num_programs(0) + tl.program_id(0)
    first, end = tl.load(first_ptr + block), tl.load(end_ptr + block)
    slot, channel = tl.program_id(0) * block_k + tl.arange(0, block_k), tl.arange(0, padded)
    mask = (slot < num_slots)[:, None] & (channel < dim)[None, :]
    k = tl.load(k_ptr + (head * num_slots + slot)[:, None] * dim + channel[None, :], mask=mask, other=0.0)
    total = tl.zeros((block_k,), tl.float32)
    for group in range(groups):
        for i in tl.range(first, end):
            t = i * block_q + tl.arange(0, block_q)
            row = (head * groups + group) * num_queries + t
            q_mask = (t < num_queries)[:, None] & (channel < dim)[None, :]
            q = tl.load(q_ptr + row[:, None] * dim + channel[None, :], mask=q_mask, other=0.0)
            lse = tl.load(lse_ptr + row, mask=t < num_queries, other=0.0)
            at = tl.load(at_ptr + batch * num_queries + t, mask=t < num_queries, other=-1)
            logits = precise_dot(q, tl.trans(k))
            if soft_cap > 0:
                logits = soft_cap * _tanh(logits / soft_cap)
            live = _live(at, slot, num_slots, sliding_window)
            total += tl.sum(tl.where(live, tl.exp(logits - lse[:, None]), 0.0), 0)
    tl.store(out_ptr + head * num_slots + slot, total, mask=slot < num_slots)


@triton.jit
def _live(pos, slot, num_slots: tl.constexpr, sliding_window: tl.constexpr):
    """Which slots [P] queries at positions [Q] see."""
    live = (slot[None, :] <= pos[:, None]) & (slot < num_slots)[None, :]
    if sliding_window > 0:
        live = live & (slot[None, :] > pos[:, None] - sliding_window)
    return live


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1
