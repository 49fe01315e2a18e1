"""Public functions of the prefill operation: checks and dispatch."""

from typing import Literal

import jax

from pallas_kernels.prefill import blocked, reference
from pallas_kernels.prefill.reference import MASK_VALUE

__all__ = ["MASK_VALUE", "Implementation", "mass", "prefill"]

Implementation = Literal["reference", "blocked"] | None

_BACKENDS = {None: blocked, "blocked": blocked, "reference": reference}


def prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    *,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: Implementation = None,
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
      implementation: None takes the platform's; "reference" is the definition, it stores a T x S matrix.

    Returns:
      The unnormalised state `acc f32[B, K, G, T, D]`, `max f32[B, K, G, T]`, `sum f32[B, K, G, T]`.

    Raises:
      ValueError: If shapes disagree or `implementation` is unknown.
    """
    _check(q, k, v, start, implementation)
    return _BACKENDS[implementation].prefill(q, k, v, start, soft_cap=soft_cap, sliding_window=sliding_window)


def mass(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Sum the attention probabilities that each key received from a chunk of queries.

    Args:
      q, k, start, soft_cap, sliding_window: As in `prefill`.
      lse: f32[B, K, G, T], log of the softmax denominators (over everything the query attended to).
      length: i32[B], real queries of the chunk; padding contributes nothing.

    Returns:
      f32[B, K, S], summed over queries and over the G heads of a group. No T x S matrix is stored.
    """
    _check(q, k, k, start, implementation)
    return _BACKENDS[implementation].mass(q, k, lse, start, length, soft_cap=soft_cap, sliding_window=sliding_window)


def _check(q, k, v, start, implementation) -> None:
    if implementation not in _BACKENDS:
        raise ValueError(f"implementation={implementation!r} must be one of None, 'blocked', 'reference'.")
    if q.ndim != 5 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"prefill needs q [B, K, G, T, D] and k, v [B, K, S, D]; got {q.shape}, {k.shape}, {v.shape}.")
    if q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1] or start.shape != q.shape[:1]:
        raise ValueError(
            f"prefill needs equal B, K and D in q, k and start [B]; got {q.shape}, {k.shape}, {start.shape}."
        )
