"""Rows of K or V, dense or quantised, read a head and a block at a time: the pieces of the `blocked` backends.

XLA CPU is fastest when one head's block is cut out of the whole array, used and forgotten, one head after another:
batching the heads inside the loop multiplies what must stay in cache.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.packing import pack_unit
from pallas_kernels.quantize_pack.reference import dequantize

Rows = jax.Array | Quantized  # [B, K, S, D], or a `Quantized` of that
READ_BLOCK = 512  # slots read at a time; more falls out of cache in float32


def num_slots(x: Rows, fmt: Format | None) -> int:
    """S of rows in `fmt`; None is dense."""
    if not isinstance(x, Quantized):
        return x.shape[2]
    bits = cast(Format, fmt).bits
    return x.codes.shape[2] if bits == 8 else x.codes.shape[2] * 32 // bits


def dim(x: Rows) -> int:
    """D of rows."""
    return (x.codes if isinstance(x, Quantized) else x).shape[-1]


def decoded(x: Rows, fmt: Format | None) -> jax.Array:
    """All rows, f32[*b, S, D]."""
    return dequantize(x, cast(Format, fmt)) if isinstance(x, Quantized) else x.astype(jnp.float32)


def cut(x: Any, b: jax.Array, h: jax.Array, first: jax.Array, block: int, slots: int) -> Any:
    """Slots first .. first + block of one head, out of arrays [B, K, rows, ...] whose rows stand for `slots` slots."""

    def one(a: jax.Array) -> jax.Array:
        at = (b, h, first * a.shape[2] // slots, *(0,) * (a.ndim - 3))
        return lax.dynamic_slice(a, at, (1, 1, block * a.shape[2] // slots, *a.shape[3:]))[0, 0]

    return jax.tree.map(one, x)


def cut_live(
    pos: jax.Array | None, q_pos: jax.Array | None, b, h, first, block: int, sliding_window: int | None
) -> jax.Array:
    """Which of the slots first .. first + block the queries of one row see by their positions: bool[1 or R, block].

    Args: as in `quantized_decode`; without `pos` all of them.
    """
    if pos is None or q_pos is None:
        return jnp.ones((1, block), bool)
    here = lax.dynamic_slice(pos, (b, h if pos.shape[1] > 1 else 0, first), (1, 1, block))[0]
    at = q_pos[b][:, None]
    live = (here >= 0) & (here <= at)
    return live if sliding_window is None else live & (here > at - sliding_window)


def unit(fmt: Format | None) -> int:
    """Slots that share a word or a scale."""
    if fmt is None:
        return 1
    return math.lcm(pack_unit(fmt.bits), fmt.group_size if fmt.axis == "channel" else 1)


def block_size(slots: int, *formats: Format | None) -> int:
    """Slots to read at a time, a whole number of the words and groups of every format."""
    together = math.lcm(*map(unit, formats))
    return min(slots, max(READ_BLOCK // together, 1) * together)


def per_head(one_head: Callable[[jax.Array, jax.Array], Any], batch: int, heads: int) -> Any:
    """Stack `one_head(b, h)` over rows and heads, one after another: [B, K, ...]."""
    out = lax.map(lambda i: one_head(i // heads, i % heads), jnp.arange(batch * heads))
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), out)


def fold_blocks(
    length: jax.Array, slots: int, block: int, step: Callable[[jax.Array, jax.Array, Any], Any], state: Any
) -> Any:
    """Fold `step(first, live, state)` over the blocks that hold slots below `length` (a scalar).

    `live` bool[1, block]: below `length` and not in a block before; the last may reach back to end at `slots`.
    """

    def body(j: jax.Array, state: Any) -> Any:
        first = jnp.minimum(j * block, slots - block)
        slot = (first + jnp.arange(block))[None]
        return step(first, (slot >= j * block) & (slot < length), state)

    return lax.fori_loop(0, (jnp.minimum(length, slots) + block - 1) // block, body, state)


def check(name: str, x: Rows, fmt: Format | None, q: jax.Array) -> int:
    """Raise ValueError unless x is rows [B, K, S, *] for q [B, K, R, *], with a format just if quantised; return S."""
    if isinstance(x, Quantized) != (fmt is not None):
        raise ValueError(f"{name}_format must be given just if {name} is Quantized; got {fmt}.")
    shape = (x.codes if isinstance(x, Quantized) else x).shape
    if q.ndim != 4 or len(shape) != 4 or shape[:2] != q.shape[:2]:
        raise ValueError(f"{name} [B, K, S, *] {shape} does not fit q [B, K, R, *] {q.shape}.")
    return num_slots(x, fmt)


def check_positions(
    pos: jax.Array | None, q_pos: jax.Array | None, q: jax.Array, slots: int, sliding_window: int | None
) -> None:
    """Raise ValueError unless `pos` and `q_pos` come together in their shapes, and with a sliding window."""
    if (pos is None) != (q_pos is None) or (sliding_window is not None and pos is None):
        raise ValueError("pos and q_pos come together, and sliding_window needs both.")
    if pos is not None and pos.shape not in ((q.shape[0], 1, slots), (*q.shape[:2], slots)):
        raise ValueError(f"pos {pos.shape} must be [B, K or 1, S] for q {q.shape} and {slots} slots.")
