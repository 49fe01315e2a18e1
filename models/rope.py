"""Rotary position embeddings and their published extensions to longer contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvcomp_jax.rotary import Rotary
from kvcomp_jax.types import Constant
from pallas_kernels.rotary import turn


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Frequencies of one layer's rotations; lengths in tokens.

    `original_max` is the context that the model was trained for before the extension.
    """

    kind: str = "default"
    theta: float = 10_000.0
    dim: int = 64  # leading dimensions of a head that rotate
    factor: float = 1.0
    original_max: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # multiplies cos and sin
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RopeConfig":
        """Undo `dataclasses.asdict`."""
        lists = {name: tuple(values[name]) for name in ("short_factor", "long_factor")}
        return cls(**{**values, **lists})


def frequencies(rope: RopeConfig, seq_len: jax.Array) -> jax.Array:
    """Angle of each pair of dimensions a token, f32[B, dim // 2].

    `seq_len` i32[B] is the length of each row's text; only "dynamic" and "longrope" look at it. A key in a cache keeps
    the angle it was stored with, so there a text that grows mixes the frequencies of its lengths: for "dynamic" as
    published implementations do, whose base drifts slowly; for "longrope" the two sets differ much, and a caller who
    knows that a text will pass `original_max` should give its final length from the start.
    """
    if rope.kind == "dynamic":
        longest = jnp.maximum(seq_len, rope.original_max).astype(jnp.float32)
        stretch = rope.factor * longest / rope.original_max - (rope.factor - 1)
        base = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
        return 1.0 / base[:, None] ** jnp.asarray(_exponent(rope))[None]
    short = jnp.asarray(_steady(rope), jnp.float32)[None]
    if rope.kind == "longrope":
        long = _unscaled(rope) / np.asarray(rope.long_factor, np.float32)
        return jnp.where((seq_len > rope.original_max)[:, None], jnp.asarray(long)[None], short)
    return jnp.broadcast_to(short, (seq_len.shape[0], rope.dim // 2))


def rotary(rope: RopeConfig) -> Rotary:
    """What a cache needs to know of a rope, with the frequencies of texts up to which they are the same."""
    switches = rope.kind in ("dynamic", "longrope")
    inv_freq = Constant(np.asarray(_steady(rope), np.float32))
    return Rotary(inv_freq, scale=rope.attention_factor, max_len=rope.original_max if switches else None)


def angles(rope: RopeConfig, pos: jax.Array, seq_len: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines f32[B, T, dim // 2] for text positions i32[B, T]."""
    angle = pos[..., None].astype(jnp.float32) * frequencies(rope, seq_len)[:, None]
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, T, H, D] by angles [B, T, dim // 2], pairing dimension i with i + dim // 2; the rest passes."""
    return turn(x, cos[:, :, None], sin[:, :, None]).astype(x.dtype)


def _exponent(rope: RopeConfig) -> np.ndarray:
    return np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)


def _unscaled(rope: RopeConfig) -> np.ndarray:
    return 1.0 / np.float32(rope.theta) ** _exponent(rope)


def _steady(rope: RopeConfig) -> np.ndarray:
    """Frequencies f32[dim // 2] of texts that are not longer than `original_max`, where that matters."""
    inverse = _unscaled(rope)
    if rope.kind == "longrope":
        return inverse / np.asarray(rope.short_factor, np.float32)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "yarn":
        return _yarn(rope, inverse)
    return _llama3(rope, inverse) if rope.kind == "llama3" else inverse


def _yarn(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Interpolate slow dimensions, keep fast ones, ramp between. Source: Peng et al. 2023, arXiv:2309.00071."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return inverse / rope.factor * ramp + inverse * (1 - ramp)


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Divide slow dimensions by `factor`, blend in the middle. Source: Llama 3.1's released configuration."""
    turns = rope.original_max * inverse / (2 * math.pi)  # over the original context
    span = rope.high_freq_factor - rope.low_freq_factor
    blend = np.clip((turns - rope.low_freq_factor) / span, 0, 1)
    return inverse / rope.factor * (1 - blend) + inverse * blend
