"""Public function of decode attention over packed rows: checks and dispatch."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.formats import Format, Quantized


def quantized_decode(
    q: jax.Array,
    k: Quantized,
    v: Quantized,
    length: jax.Array,
    pos: jax.Array | None = None,
    q_pos: jax.Array | None = None,
    *,
    k_format: Format,
    v_format: Format,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attend from a few queries to quantised keys and values, of which only the packed bytes are read.

    Scales of keys fold into q and those of values into p, so codes enter the products as they are.

    Args:
      q: [B, K, R, D], already multiplied by the softmax scale; R = query heads of a KV head times query tokens.
      k, v: Arrays of `quantize_pack` over [B, K, S, D], each in its own format.
      length: i32[B], slots at or beyond it are dead.
      pos: i32[B, K or 1, S], text position of each slot, -1 = empty; None where `length` says it all: every slot below
        it is live for every query.
      q_pos: i32[B, R], text position of each query; needed with `pos`. A query sees slots at positions up to its own.
      k_format, v_format: What the arrays mean.
      soft_cap: Logits become `soft_cap * tanh(logits / soft_cap)`.
      sliding_window: With `pos`: a query sees positions beyond `q_pos - sliding_window`.
      implementation: See `pallas_kernels.dispatch.call`.
      interpret: Run a Pallas or Triton backend in its interpreter.

    Returns:
      The unnormalised state `acc f32[B, K, R, D]`, `max f32[B, K, R]`, `sum f32[B, K, R]`: a query without a live slot
      has sum 0 and a finite max.

    Raises:
      ValueError: If shapes disagree, or `pos` and `q_pos` do not come together.
    """
    num_slots = _num_slots(k, k_format)
    if q.ndim != 4 or k.codes.shape[:2] != q.shape[:2] or k.codes.shape[-1] != q.shape[-1]:
        raise ValueError(f"q [B, K, R, D] {q.shape} does not fit codes of keys {k.codes.shape}.")
    if v.codes.shape[:2] != q.shape[:2] or _num_slots(v, v_format) != num_slots:
        raise ValueError(f"codes of values {v.codes.shape} do not fit q {q.shape} and {num_slots} slots of keys.")
    if (pos is None) != (q_pos is None) or (sliding_window is not None and pos is None):
        raise ValueError("pos and q_pos come together, and sliding_window needs both.")
    if pos is not None and pos.shape not in ((q.shape[0], 1, num_slots), (*q.shape[:2], num_slots)):
        raise ValueError(f"pos {pos.shape} must be [B, K or 1, S] for q {q.shape} and {num_slots} slots.")
    options = {"k_format": k_format, "v_format": v_format, "soft_cap": soft_cap, "sliding_window": sliding_window}
    return dispatch.call(
        "quantized_decode", implementation, q, k, v, length, pos, q_pos, **options, interpret=interpret
    )


def _num_slots(enc: Quantized, fmt: Format) -> int:
    rows = enc.codes.shape[2]
    return rows if fmt.bits == 8 else rows * 32 // fmt.bits
