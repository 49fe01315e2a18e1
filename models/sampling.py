"""Choosing the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose: temperature 0 takes the most likely token; top_k = 0 and top_p = 1 cut nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 takes the most likely token.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 cuts nothing.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1].")


def sample(sampling: Sampling, key: jax.Array, logits: jax.Array) -> jax.Array:
    """Draw a token for each row: i32[B] from logits f32[B, V] and one key a row."""
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    return jax.vmap(jax.random.categorical)(key, logits).astype(jnp.int32)


def _nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Drop tokens once those more likely than them already hold `top_p`. Source: Holtzman et al., arXiv:1904.09751."""
    order = jnp.argsort(-logits, -1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), -1)
    before = jnp.cumsum(probs, -1) - probs
    rank = jnp.argsort(order, -1)
    return jnp.where(jnp.take_along_axis(before, rank, -1) < top_p, logits, -jnp.inf)
