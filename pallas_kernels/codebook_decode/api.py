"""Public function of decode attention over codes of non-uniform levels: checks and dispatch."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.codebook_decode.rows import CodebookRows
from pallas_kernels.rows import check_positions
from pallas_kernels.softmax_state import State


def codebook_decode(
    q: jax.Array,
    k: CodebookRows,
    v: CodebookRows,
    length: jax.Array,
    pos: jax.Array | None = None,
    q_pos: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> State:
    """Attend from a few queries to keys and values that are codes of levels; keys may rotate as they are read.

    Args:
      q: [B, K, R, D], already multiplied by the softmax scale, and rotated where keys are.
      k, v: Rows of [B, K, S, D]; only keys may have a `rope`, and turn by the `pos` of their slots.
      length, pos, q_pos, soft_cap, sliding_window, implementation, interpret: As in `quantized_decode`; keys that
        rotate need `pos`.

    Returns:
      The unnormalised state `acc f32[B, K, R, D]`, `max f32[B, K, R]`, `sum f32[B, K, R]`: a query without a live slot
      has sum 0 and a finite max.

    Raises:
      ValueError: If shapes disagree, positions are missing, or values have a `rope`.
    """
    for name, x in (("keys", k), ("values", v)):
        if x.bits not in (2, 3, 4) or len(x.levels) != 2**x.bits:
            raise ValueError(f"{name} have {len(x.levels)} levels, which must be 4, 8 or 16.")
        if q.ndim != 4 or x.codes.shape[:2] + x.codes.shape[3:] not in _shapes(q):
            raise ValueError(f"codes of {name} {x.codes.shape} do not fit q [B, K, R, D] {q.shape}.")
    if k.num_slots != v.num_slots:
        raise ValueError(f"{k.num_slots} slots of keys are not {v.num_slots} of values.")
    if v.rope is not None:
        raise ValueError("values do not rotate; only keys may have a rope.")
    if k.rope is not None and (pos is None or 2 * k.rope.shape[1] > q.shape[3]):
        raise ValueError(f"keys that rotate {2 * k.rope.shape[1]} of {q.shape[3]} channels need pos, and not more.")
    check_positions(pos, q_pos, q, k.num_slots, sliding_window)
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    args = (q, k, v, length, pos, q_pos)
    return dispatch.call("codebook_decode", implementation, *args, **options, interpret=interpret)


def _shapes(q: jax.Array) -> tuple[tuple[int, int, int], ...]:
    """What codes of rows for q may have as batch, heads and channels: apart, or joined."""
    batch, heads, _, dim = q.shape
    return (batch, heads, dim), (batch, 1, heads * dim)
