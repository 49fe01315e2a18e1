"""Decode attention over codes of non-uniform levels on TPUs: levels are picked along lanes, all else is folded in.

What keys have by channel goes into the queries, what values have by channel onto the result.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import tpu_decode
from pallas_kernels.codebook_decode.block_sizes import tpu_sizes
from pallas_kernels.codebook_decode.rows import CodebookRows
from pallas_kernels.codebook_decode.tpu_queries import lane_turns, queries
from pallas_kernels.codebook_decode.tpu_side import Levels
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format
from pallas_kernels.softmax_state import State
from pallas_kernels.tpu_rows import LANES, SUBLANES, tokens_along_lanes, whole_lanes


def codebook_decode(
    q: jax.Array,
    k: CodebookRows,
    v: CodebookRows,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    soft_cap: float | None,
    sliding_window: int | None,
    interpret: bool = False,
) -> State:
    """See `api.codebook_decode`."""
    heads, num_rows, dim = q.shape[1:]
    joined = [heads if x.codes.shape[1] != heads else 1 for x in (k, v)]
    for count in joined:
        _check(dim, count)
    formats = [Format(x.bits, "token", dim) for x in (k, v)]
    block, tile = tpu_sizes(q, k, v)
    dtype = tpu_decode.product_dtype(q)
    turns = None if k.rope is None else lane_turns(jnp.asarray(k.rope), whole_lanes(dim))
    num_pairs = 0 if k.rope is None else k.rope.shape[1]
    exact = dtype == jnp.float32
    keys = Levels(formats[0], dim, block, tile, joined[0], exact or turns is not None, num_pairs)
    values = Levels(formats[1], dim, block, tile, joined[1], exact)
    acc, top, total = tpu_decode.decode(
        "codebook_decode", queries(tpu_decode.padded(q), k, keys.width), (k, pos, turns), (v, None, None), length,
        pos, q_pos, keys=keys, values=values, num_rows=num_rows, num_slots=k.num_slots, dtype=dtype,
        soft_cap=soft_cap, sliding_window=sliding_window, interpret=interpret,
    )  # fmt: skip
    if v.channel_scale is not None:
        acc *= v.channel_scale[:, :, None]
    if v.channel_zero_point is not None:
        acc += total[..., None] * v.channel_zero_point[:, :, None]
    return acc, top, total


def _check(dim: int, joined: int) -> None:
    """A head's channels must be whole tiles of memory, or whole in one register."""
    if joined == 1:
        return
    if tokens_along_lanes(dim * joined):
        if dim % SUBLANES:
            raise Unsupported(f"head_dim={dim} of joined heads is no multiple of {SUBLANES}.")
    elif dim % LANES and LANES % dim:
        raise Unsupported(f"head_dim={dim} of {joined} joined heads neither divides {LANES} nor is a multiple of it.")
