"""Public function of decode attention over entropy-coded rows: checks and dispatch."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.entropy_decode.formats import Streams
from pallas_kernels.entropy_decode.rows import RowFormat, Rows, num_slots
from pallas_kernels.rows import check_positions


def entropy_decode(
    q: jax.Array,
    k: Rows,
    v: Rows,
    k_lengths: jax.Array | None,
    v_lengths: jax.Array | None,
    length: jax.Array,
    pos: jax.Array | None = None,
    q_pos: jax.Array | None = None,
    *,
    k_format: RowFormat,
    v_format: RowFormat,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attend from a few queries to keys and values whose codes take a variable number of bits.

    Args:
      q: [B, K, R, D], already multiplied by the softmax scale.
      k, v: `Streams` or `Planes` over [B, K, S, D], each in its own format.
      k_lengths, v_lengths: u8[B, K, J, n], code lengths of all tables of `Streams`; None for `Planes`.
      length, pos, q_pos, soft_cap, sliding_window, implementation, interpret: As in `quantized_decode`.
      k_format, v_format: What the arrays mean.

    Returns:
      The unnormalised state `acc f32[B, K, R, D]`, `max f32[B, K, R]`, `sum f32[B, K, R]`: a query without a live slot
      has sum 0 and a finite max.

    Raises:
      ValueError: If shapes disagree, or `pos` and `q_pos` do not come together. TypeError: If streams lack tables.
    """
    for rows, lengths in ((k, k_lengths), (v, v_lengths)):
        if isinstance(rows, Streams) and lengths is None:
            raise TypeError("streams need tables of code lengths, k_lengths and v_lengths; only planes do without.")
    slots = num_slots(k, k_format)
    if q.ndim != 4 or k.scale.shape[:2] != q.shape[:2] or k_format.head_dim != q.shape[-1]:
        raise ValueError(f"q [B, K, R, D] {q.shape} does not fit keys {k.scale.shape} of {k_format.head_dim} channels.")
    if v.scale.shape[:2] != q.shape[:2] or num_slots(v, v_format) != slots:
        raise ValueError(f"values {v.scale.shape} in {num_slots(v, v_format)} slots do not fit {slots} slots of keys.")
    check_positions(pos, q_pos, q, slots, sliding_window)
    options = {"k_format": k_format, "v_format": v_format, "soft_cap": soft_cap, "sliding_window": sliding_window}
    args = (q, k, v, k_lengths, v_lengths, length, pos, q_pos)
    return dispatch.call("entropy_decode", implementation, *args, **options, interpret=interpret)
