"""Contractions of rows that have one scale a token: values alone are read, the scale meets logits and probabilities."""

import jax
import jax.numpy as jnp


def dot_scaled(
    q: jax.Array, values: jax.Array, scale: jax.Array | float | None, zero_point: jax.Array | None = None
) -> jax.Array:
    """Return q . (values * scale + zero_point)^T, f32[*b, R, S].

    Args:
      q: [*b, R, D]. values: f32[*b, S, D].
      scale: [*b, S], a number for all tokens, or None for 1.
      zero_point: [*b, S] or None for 0; it meets the sum of q.
    """
    q = q.astype(jnp.float32)
    logits = jnp.einsum("...sd,...rd->...sr", values, q).swapaxes(-1, -2)  # a quarter faster on CPU than q on the left
    if scale is not None:
        logits = logits * _over_rows(scale)
    return logits if zero_point is None else logits + q.sum(-1, keepdims=True) * _over_rows(zero_point)


def mix_scaled(
    p: jax.Array, values: jax.Array, scale: jax.Array | float | None, zero_point: jax.Array | None = None
) -> jax.Array:
    """Return p . (values * scale + zero_point), f32[*b, R, D], for p f32[*b, R, S]; the rest as in `dot_scaled`."""
    mixed = jnp.einsum("...rs,...sd->...rd", p if scale is None else p * _over_rows(scale), values)
    return mixed if zero_point is None else mixed + (p * _over_rows(zero_point)).sum(-1, keepdims=True)


def _over_rows(x: jax.Array | float) -> jax.Array | float:
    """[*b, S] -> f32[*b, 1, S]."""
    return x.astype(jnp.float32)[..., None, :] if isinstance(x, jax.Array) else x
