"""Public functions of the prefill operation: checks and dispatch."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.prefill.reference import MASK_VALUE, stands_at

__all__ = ["MASK_VALUE", "mass", "prefill", "prefill_with_mass", "probe_mass"]


def prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    *,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attend causally from a chunk of queries to the keys written so far.

    Query t of row b stands at slot `start[b] + t` and sees slots `s <= start[b] + t`, with a sliding window only
    those with `s > start[b] + t - sliding_window`.

    Args:
      q: [B, K, G, T, D], already multiplied by the softmax scale.
      k, v: [B, K, S, D]; slots beyond a row's last query are never read.
      start: i32[B], slots filled before this chunk.
      soft_cap: Logits become `soft_cap * tanh(logits / soft_cap)` (Gemma 2).
      sliding_window: Tokens a query sees, itself included; None sees all.
      implementation: See `pallas_kernels.dispatch.call`; the reference stores a T x S matrix.
      interpret: Run a Pallas or Triton backend in its interpreter.

    Returns:
      The unnormalised state `acc f32[B, K, G, T, D]`, `max f32[B, K, G, T]`, `sum f32[B, K, G, T]`.

    Raises:
      ValueError: If shapes disagree or `implementation` is unknown.
    """
    _check(q, k, v, start)
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    return dispatch.call("prefill", implementation, q, k, v, start, **options, interpret=interpret)


def prefill_with_mass(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Run `prefill` and sum the probabilities that each key received, in one pass where the backend can.

    Args:
      q, k, v, start, soft_cap, sliding_window, implementation, interpret: As in `prefill`.
      length: As in `mass`.

    Returns:
      The state of `prefill`, and what `mass` gives if the queries attended to these keys alone.
    """
    _check(q, k, v, start)
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    return dispatch.call(
        "prefill", implementation, q, k, v, start, length, **options, function="prefill_with_mass", interpret=interpret
    )


def mass(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Sum the attention probabilities that each key received from a chunk of queries.

    Args:
      q, k, start, soft_cap, sliding_window: As in `prefill`.
      lse: f32[B, K, G, T], log of the softmax denominators (over everything the query attended to).
      length: i32[B], real queries of the chunk; padding contributes nothing.

    Returns:
      f32[B, K, S], summed over queries and over the G heads of a group. No T x S matrix is stored.
    """
    _check(q, k, k, start)
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    at = stands_at(start, length, q.shape[3])
    return probe_mass(q, k, lse, at, **options, implementation=implementation, interpret=interpret)


def probe_mass(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    at: jax.Array,
    *,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Sum the attention probabilities that each key received from queries anywhere in the text.

    Args:
      q: [B, K, G, N, D], already multiplied by the softmax scale.
      k: [B, K, S, D].
      lse: f32[B, K, G, N], log of the softmax denominators.
      at: i32[B, N], slot at which each query stands, in any order; -1 = none.
      soft_cap, sliding_window, implementation, interpret: As in `mass`.

    Returns:
      f32[B, K, S], summed over queries and over the G heads of a group.

    Raises:
      ValueError: If shapes disagree.
    """
    if q.ndim != 5 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"probe_mass needs q [B, K, G, N, D] and k [B, K, S, D]; got {q.shape}, {k.shape}.")
    if at.shape != (q.shape[0], q.shape[3]) or lse.shape != q.shape[:4]:
        raise ValueError(f"at {at.shape} must be [B, N] and lse {lse.shape} [B, K, G, N] for q {q.shape}.")
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    return dispatch.call(
        "prefill", implementation, q, k, lse, at, **options, function="probe_mass", interpret=interpret
    )


def _check(q, k, v, start) -> None:
    if q.ndim != 5 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"prefill needs q [B, K, G, T, D] and k, v [B, K, S, D]; got {q.shape}, {k.shape}, {v.shape}.")
    if q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1] or start.shape != q.shape[:1]:
        raise ValueError(
            f"prefill needs equal B, K and D in q, k and start [B]; got {q.shape}, {k.shape}, {start.shape}."
        )
