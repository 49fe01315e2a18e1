"""Decode attention over rows of a variable number of bits in Triton, Ampere and newer: two kernels, split over units.

The first multiplies queries by keys as it decodes them and stores logits and each split's maximum; the second
multiplies probabilities by values as it decodes those. Of a token only its logits are stored.
Source: one kernel for keys, one for values: KVComp, arXiv:2509.00579, and PackKV, arXiv:2512.24449.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton

from pallas_kernels import triton_calls
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.entropy_decode.block_sizes import gpu_splits
from pallas_kernels.entropy_decode.canonical import look_up_table
from pallas_kernels.entropy_decode.formats import PlaneFormat, Planes, StreamFormat, Streams
from pallas_kernels.entropy_decode.gpu_planes import dot_planes, mix_planes
from pallas_kernels.entropy_decode.gpu_streams import dot_streams, mix_streams
from pallas_kernels.entropy_decode.rows import RowFormat, Rows, num_slots
from pallas_kernels.softmax_state import State
from pallas_kernels.triton_attention import merge


def entropy_decode(
    q: jax.Array,
    k: Rows,
    v: Rows,
    k_lengths: jax.Array | None,
    v_lengths: jax.Array | None,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    k_format: RowFormat,
    v_format: RowFormat,
    soft_cap: float | None,
    sliding_window: int | None,
    interpret: bool = False,
) -> State:
    """See `api.entropy_decode`."""
    _check(k_format, "token", "keys")
    _check(v_format, "channel", "values")
    (batch, heads, num_rows, dim), slots = q.shape, num_slots(k, k_format)
    splits, slots_of_split = gpu_splits(batch * heads, slots, k_format.block, v_format.block)
    padded = 8 if num_rows <= 8 else 16
    grid = batch * heads, splits, triton.cdiv(num_rows, padded)
    constants = {"num_heads": heads, "num_rows": num_rows, "num_slots": slots, "dim": dim, "rows": padded,
                 "slots_of_split": slots_of_split}  # fmt: skip
    masks = {"pos_heads": 0 if pos is None else pos.shape[1], "soft_cap": soft_cap or 0.0,
             "sliding_window": sliding_window or 0}  # fmt: skip
    split = jax.ShapeDtypeStruct((batch, heads, splits, num_rows), jnp.float32)
    logits, top = triton_calls.call(
        dot_planes if isinstance(k_format, PlaneFormat) else dot_streams,
        (q, *_arrays(k, k_lengths, k_format), length, *((length, length) if pos is None else (pos, q_pos))),
        [jax.ShapeDtypeStruct((batch, heads, slots, num_rows), jnp.float32), split],
        grid,
        {**constants, **masks, **_constants(q, k, k_lengths, k_format)},
        interpret=interpret,
        num_warps=_num_warps(k_format),
    )
    acc, total = triton_calls.call(
        mix_planes if isinstance(v_format, PlaneFormat) else mix_streams,
        (logits, top, *_arrays(v, v_lengths, v_format), length),
        [jax.ShapeDtypeStruct((*split.shape, dim), jnp.float32), split],
        grid,
        {**constants, **_constants(q, v, v_lengths, v_format)},
        interpret=interpret,
        num_warps=_num_warps(v_format),
    )
    return merge(acc, top, total)


def _check(fmt: RowFormat, along: str, what: str) -> None:
    """Streams must end where a product does: a thread then adds up its own symbols."""
    if not isinstance(fmt, StreamFormat):
        return
    if fmt.along != along:
        raise Unsupported(f"streams of {what} run along each {along} here, not along={fmt.along!r}.")
    if fmt.pieces & (fmt.pieces - 1):
        raise Unsupported(f"a line of {fmt.line} symbols in {fmt.pieces} streams, which is no power of two.")


def _arrays(x: Rows, lengths: Any, fmt: Any) -> tuple[jax.Array, ...]:
    """Everything that a kernel reads of rows: payload, what says how it is read, scales and zero points."""
    if isinstance(x, Planes):
        return x.planes, x.heads, x.scale, x.zero_point
    return x.words, x.ends, x.choice, look_up_table(lengths, fmt.max_bits), x.scale, x.zero_point


def _constants(q: jax.Array, x: Rows, lengths: jax.Array | None, fmt: RowFormat) -> dict[str, Any]:
    """What a kernel must know of rows; planes are multiplied in bfloat16 unless q has 32 bits."""
    scales = {"block": fmt.block, "scale_rows": x.scale.shape[2], "scale_cols": x.scale.shape[3]}
    if isinstance(x, Planes) and isinstance(fmt, PlaneFormat):
        return {
            **scales,
            "pack": fmt.pack,
            "code_bits": fmt.code_bits,
            "width_bits": fmt.width_bits,
            "num_planes": x.planes.shape[-1],
            "rounds": triton.next_power_of_2(fmt.block // fmt.pack),
            "channels": max(16, triton.next_power_of_2(fmt.head_dim)),
            "narrow": q.dtype != jnp.float32,
        }
    if isinstance(x, Streams) and isinstance(fmt, StreamFormat) and lengths is not None:
        return {
            **scales,
            "num_words": x.words.shape[-1],
            "num_streams": fmt.num_streams,
            "max_bits": fmt.max_bits,
            "num_tables": lengths.shape[-2],
            "streams": triton.next_power_of_2(fmt.num_streams),
            "pieces": fmt.pieces,
            "size": fmt.line // fmt.pieces,
            "together": fmt.lines_together,
        }
    raise TypeError(f"{type(x).__name__} do not fit {type(fmt).__name__}; streams need tables of code lengths, too.")


def _num_warps(fmt: RowFormat) -> int:
    """A thread for each stream; planes of 64 tokens of 128 channels fit the registers of four warps."""
    if isinstance(fmt, PlaneFormat):
        return 4
    return min(max(triton.next_power_of_2(fmt.num_streams) // 32, 1), 4)
