"""Decode attention over bfloat16 rows, split over slots like the quantised kernel: the baseline of our own."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_calls
from pallas_kernels.triton_attention import merge

BLOCK, PROGRAMS = 64, 132 * 4


def bf16_decode(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """q [B, K, R, D] times all of k, v [B, K, S, D] -> f32[B, K, R, D]; S a multiple of 64, D a power of two."""
    batch, heads, rows, dim = q.shape
    slots = k.shape[2]
    tiles = slots // BLOCK
    per_split = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // (batch * heads))))
    split = (batch, heads, triton.cdiv(tiles, per_split), rows)
    out = [jax.ShapeDtypeStruct((*split, dim), jnp.float32), *[jax.ShapeDtypeStruct(split, jnp.float32)] * 2]
    sizes = {"num_rows": rows, "num_slots": slots, "dim": dim, "rows": 8 if rows <= 8 else 16, "block": BLOCK}
    state = triton_calls.call(
        _kernel, (q, k, v), out, (batch * heads, split[2]), {**sizes, "tiles": per_split}, interpret=interpret
    )
    acc, _, total = merge(*state)
    return acc / total[..., None]


@triton.jit
def _kernel(
    q_ptr, k_ptr, v_ptr, acc_ptr, top_ptr, total_ptr,
    num_rows: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
    tiles: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, channel = tl.arange(0, rows), tl.arange(0, dim)
    exists = (row < num_rows)[None, :] & (channel < dim)[:, None]
    q = tl.load(q_ptr + (head * num_rows + row)[None, :] * dim + channel[:, None], mask=exists, other=0.0)  # [D, R]
    acc, total = tl.zeros((dim, rows), tl.float32), tl.zeros((rows,), tl.float32)
    top = tl.full((rows,), -1e30, tl.float32)
    first = split * tiles * block
    for start in tl.range(first, tl.minimum(first + tiles * block, num_slots), block):
        slot = head * num_slots + start + tl.arange(0, block)
        logits = tl.dot(tl.load(k_ptr + slot[:, None] * dim + channel[None, :]), q)  # [P, R]
        new_top = tl.maximum(top, tl.max(logits, 0))
        keep, p = tl.exp(top - new_top), tl.exp(logits - new_top[None, :])
        v = tl.load(v_ptr + slot[None, :] * dim + channel[:, None])  # [D, P]
        acc = tl.dot(v, p.to(v.dtype), acc * keep[None, :])
        top, total = new_top, total * keep + tl.sum(p, 0)
    out = (head * tl.num_programs(1) + split) * num_rows + row
    tl.store(acc_ptr + out[None, :] * dim + channel[:, None], acc, mask=exists)
    tl.store(top_ptr + out, top, mask=row < num_rows)
    tl.store(total_ptr + out, total, mask=row < num_rows)
