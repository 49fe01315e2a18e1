"""Public function of homomorphic decode attention: checks and dispatch."""

import jax

from pallas_kernels import dispatch, rows
from pallas_kernels.formats import Format, Quantized


def homomorphic_decode(
    q: jax.Array,
    k: Quantized,
    v: Quantized,
    k_sums: jax.Array,
    v_sums: jax.Array,
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
    """Attend to quantised keys and values with integer products only; no code is ever dequantised.

    Queries are rounded to 8 bits a partition of `k_format.group_size` channels, probabilities to 8 bits a partition of
    `v_format.group_size` tokens, both to the nearest. The softmax sum is taken from unrounded probabilities.

    Args:
      q: [B, K, R, D], already multiplied by the softmax scale.
      k, v: Arrays of `quantize_pack` over [B, K, S, D]. A scale must be constant along what is summed over: keys are
        grouped per token, values per channel.
      k_sums, v_sums: `code_sums` of k and v, kept since they were encoded.
      length, pos, q_pos, soft_cap, sliding_window, implementation, interpret: As in `quantized_decode`.

    Returns:
      The unnormalised state `acc f32[B, K, R, D]`, `max f32[B, K, R]`, `sum f32[B, K, R]`.

    Raises:
      ValueError: If shapes disagree, or the formats group along the wrong axis.

    Source: HACK, Zhang et al. 2025, arXiv:2502.03589.
    """
    if k_format.axis != "token" or v_format.axis != "channel":
        raise ValueError(f"keys group per token and values per channel, got {k_format.axis} and {v_format.axis}.")
    slots = rows.check("k", k, k_format, q)
    if rows.check("v", v, v_format, q) != slots or rows.dim(k) != q.shape[-1] or rows.dim(v) != q.shape[-1]:
        raise ValueError(f"codes of k {k.codes.shape} and v {v.codes.shape} do not fit q {q.shape}.")
    if k_sums.shape != k.scale.shape or v_sums.shape != v.scale.shape:
        raise ValueError(
            f"sums {k_sums.shape}, {v_sums.shape} must be shaped as scales {k.scale.shape}, {v.scale.shape}."
        )
    rows.check_positions(pos, q_pos, q, slots, sliding_window)
    options = {"k_format": k_format, "v_format": v_format, "soft_cap": soft_cap, "sliding_window": sliding_window}
    return dispatch.call(
        "homomorphic_decode", implementation, q, k, v, k_sums, v_sums, length, pos, q_pos, **options,
        interpret=interpret,
    )  # fmt: skip
