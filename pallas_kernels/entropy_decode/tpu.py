"""Decode attention over rows of a variable number of bits on TPUs: tiles are decoded in vector memory and multiplied.

Scales are folded into queries, logits and probabilities as for codes of 8 bits.
Source: fused decoding and products: KVComp, arXiv:2509.00579, and PackKV, arXiv:2512.24449.
"""

import math

import jax

from pallas_kernels import tpu_decode
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.entropy_decode.block_sizes import tpu_sizes
from pallas_kernels.entropy_decode.canonical import look_up_table
from pallas_kernels.entropy_decode.formats import PlaneFormat, Planes, StreamFormat, Streams
from pallas_kernels.entropy_decode.rows import RowFormat, Rows, num_slots
from pallas_kernels.entropy_decode.tpu_planes import PlanesReader
from pallas_kernels.entropy_decode.tpu_side import Coded, Reader, Stored
from pallas_kernels.entropy_decode.tpu_streams import StreamsReader, packed_tables
from pallas_kernels.formats import Format
from pallas_kernels.softmax_state import State


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
    slots = num_slots(k, k_format)
    block, tile = tpu_sizes(slots, math.lcm(k_format.block, v_format.block))
    _check(k_format, "token", "keys")
    _check(v_format, "channel", "values")
    return tpu_decode.decode(
        "entropy_decode", tpu_decode.padded(q), _stored(k, k_lengths, k_format), _stored(v, v_lengths, v_format),
        length, pos, q_pos,
        keys=_side(k, k_lengths, k_format, block, tile), values=_side(v, v_lengths, v_format, block, tile),
        num_rows=q.shape[2], num_slots=slots, dtype=tpu_decode.product_dtype(q),
        soft_cap=soft_cap, sliding_window=sliding_window, interpret=interpret,
    )  # fmt: skip


def _check(fmt: RowFormat, along: str, what: str) -> None:
    """Words of four codes must be whole along what lies along sublanes."""
    if fmt.block % 32:
        raise Unsupported(f"units of {fmt.block} tokens are no whole number of 32.")
    if not isinstance(fmt, StreamFormat):
        return
    if fmt.along != along:
        raise Unsupported(f"streams of {what} run along each {along} here, not along={fmt.along!r}.")
    if fmt.line // fmt.pieces % 4:
        raise Unsupported(f"a stream holds {fmt.line // fmt.pieces} symbols of a line, no whole number of 4.")


def _reader(x: Rows, lengths: jax.Array | None, fmt: RowFormat) -> Reader:
    if isinstance(x, Planes) and isinstance(fmt, PlaneFormat):
        return PlanesReader(fmt, x.planes.shape[-1])
    if isinstance(x, Streams) and isinstance(fmt, StreamFormat) and lengths is not None:
        return StreamsReader(fmt, x.words.shape[-1], lengths.shape[-2])
    raise TypeError(f"{type(x).__name__} do not fit {type(fmt).__name__}; streams need tables of code lengths, too.")


def _stored(x: Rows, lengths: jax.Array | None, fmt: RowFormat) -> Stored:
    tables = None
    if isinstance(fmt, StreamFormat) and lengths is not None:
        tables = packed_tables(look_up_table(lengths, fmt.max_bits))
    return Stored(_reader(x, lengths, fmt).arrays(x), tables, x.scale, x.zero_point)


def _side(x: Rows, lengths: jax.Array | None, fmt: RowFormat, block: int, tile: int) -> Coded:
    rows, cols = x.scale.shape[2:]
    units = num_slots(x, fmt) // fmt.block
    if rows == units and cols == fmt.head_dim:
        scales = Format(8, "channel", fmt.block)
    elif rows == units * fmt.block or (rows == units and cols == 1):
        scales = Format(8, "token", fmt.head_dim // cols)
    else:
        raise Unsupported(f"scales {rows} x {cols} of {units} units of {fmt.block} tokens, {fmt.head_dim} channels.")
    along_tokens = isinstance(fmt, StreamFormat) and fmt.along == "token"
    shared = rows == units and cols == 1
    return Coded(scales, fmt.head_dim, block, tile, _reader(x, lengths, fmt), fmt.block, along_tokens, shared)
