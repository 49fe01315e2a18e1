"""Public function of decode attention over low-rank coefficients: checks and dispatch."""

import jax

from pallas_kernels import dispatch, rows
from pallas_kernels.formats import Format


def low_rank_decode(
    q: jax.Array,
    k: rows.Rows,
    v: rows.Rows,
    length: jax.Array,
    pos: jax.Array | None = None,
    q_pos: jax.Array | None = None,
    *,
    k_format: Format | None = None,
    v_format: Format | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attend from a few projected queries to coefficients of keys and values, which stay coefficients.

    With keys C_k B_k and values C_v B_v the caller gives q B_k^T and multiplies acc by B_v: two small products a step
    instead of one a cached token.

    Args:
      q: [B, K, R, r], projected to the basis of the keys and multiplied by the softmax scale.
      k: [B, K, S, r] in f32 or bf16, or the arrays of `quantize_pack` over it. r a multiple of 16.
      v: [B, K, S, r'] likewise; its rank may differ.
      length, pos, q_pos, soft_cap, sliding_window: As in `quantized_decode`.
      k_format, v_format: What quantised arrays mean; None for dense ones.
      implementation: See `pallas_kernels.dispatch.call`.
      interpret: Run a Pallas or Triton backend in its interpreter.

    Returns:
      The unnormalised state `acc f32[B, K, R, r']`, `max f32[B, K, R]`, `sum f32[B, K, R]`.

    Raises:
      ValueError: If shapes disagree, a rank is no multiple of 16, a format is missing or `pos` comes without `q_pos`.
    """
    slots = rows.check("k", k, k_format, q)
    if rows.check("v", v, v_format, q) != slots:
        raise ValueError(f"v must have the {slots} slots of k.")
    if rows.dim(k) != q.shape[-1] or rows.dim(k) % 16 or rows.dim(v) % 16:
        raise ValueError(f"q {q.shape} needs keys of its rank; ranks {rows.dim(k)}, {rows.dim(v)} multiples of 16.")
    rows.check_positions(pos, q_pos, q, slots, sliding_window)
    options = {"k_format": k_format, "v_format": v_format, "soft_cap": soft_cap, "sliding_window": sliding_window}
    return dispatch.call("low_rank_decode", implementation, q, k, v, length, pos, q_pos, **options, interpret=interpret)
