"""Rotary position embeddings and their published extensions to longer contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


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


def rope_from_hf(config: Mapping[str, Any], head_dim: int, *, local: bool = False) -> RopeConfig:
    """Read `rope_parameters`, or the older `rope_theta` with `rope_scaling`.

    Args:
      config: config.json.
      head_dim: Size of a head.
      local: Whether the layer has a sliding window; Gemma 3 has a base of its own there.

    Raises:
      ValueError: If the rope type is unknown or lacks a parameter.
    """
    params = _parameters(config, local)
    kind = params.get("rope_type") or params.get("type") or "default"
    kind = {"su": "longrope", "mrope": "default"}.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(f"rope_type={kind!r} is not supported; supported: {', '.join(KINDS)}.")
    partial = params.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dim = int(head_dim * partial)
    base = RopeConfig(kind=kind, theta=float(params["rope_theta"]), dim=dim)
    return base if kind == "default" else dataclasses.replace(base, **_EXTENSIONS[kind](config, params, dim))


def frequencies(rope: RopeConfig, seq_len: jax.Array) -> jax.Array:
    """Angle of each pair of dimensions a token, f32[B, dim // 2].

    `seq_len` i32[B] matters to "dynamic" and "longrope" alone: the text's length so far.
    """
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    if rope.kind == "dynamic":
        longest = jnp.maximum(seq_len, rope.original_max).astype(jnp.float32)
        stretch = rope.factor * longest / rope.original_max - (rope.factor - 1)
        base = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
        return 1.0 / base[:, None] ** jnp.asarray(exponent)[None]
    inverse = 1.0 / np.float32(rope.theta) ** exponent
    if rope.kind == "longrope":
        short, long = (inverse / np.asarray(f, np.float32) for f in (rope.short_factor, rope.long_factor))
        return jnp.where((seq_len > rope.original_max)[:, None], jnp.asarray(long)[None], jnp.asarray(short)[None])
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "yarn":
        inverse = _yarn(rope, inverse)
    elif rope.kind == "llama3":
        inverse = _llama3(rope, inverse)
    return jnp.broadcast_to(jnp.asarray(inverse, jnp.float32)[None], (seq_len.shape[0], rope.dim // 2))


def angles(rope: RopeConfig, pos: jax.Array, seq_len: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines f32[B, T, dim // 2] for text positions i32[B, T]."""
    angle = pos[..., None].astype(jnp.float32) * frequencies(rope, seq_len)[:, None]
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, T, H, D] by angles [B, T, dim // 2], pairing dimension i with i + dim // 2; the rest passes."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b, rest = (part.astype(jnp.float32) for part in jnp.split(x, (half, 2 * half), -1))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)


def _parameters(config: Mapping[str, Any], local: bool) -> dict[str, Any]:
    """One layer's rope parameters in the new spelling."""
    own_base = config.get("model_type") == "gemma3_text"
    theta = config.get("rope_theta") or (1_000_000.0 if own_base else 10_000.0)
    params = config.get("rope_parameters")
    if params and ("full_attention" in params or "sliding_attention" in params):
        params = params.get("sliding_attention" if local else "full_attention") or {}
        return {"rope_theta": 10_000.0 if local else theta, **params}
    if own_base and local:
        return {"rope_theta": config.get("rope_local_base_freq") or 10_000.0}
    return {"rope_theta": theta, **(params or config.get("rope_scaling") or {})}


def _required(params: Mapping[str, Any], *names: str) -> list[Any]:
    missing = [name for name in names if params.get(name) is None]
    if missing:
        raise ValueError(f"rope parameters {dict(params)} lack {', '.join(map(repr, missing))}.")
    return [params[name] for name in names]


def _read_linear(config, params, dim) -> dict[str, Any]:
    return {"factor": float(_required(params, "factor")[0])}


def _read_dynamic(config, params, dim) -> dict[str, Any]:
    (factor,) = _required(params, "factor")
    return {"factor": float(factor), "original_max": int(config["max_position_embeddings"])}


def _read_llama3(config, params, dim) -> dict[str, Any]:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = _required(params, *names)
    return {
        "factor": float(factor),
        "low_freq_factor": float(low),
        "high_freq_factor": float(high),
        "original_max": int(original),
    }


def _read_yarn(config, params, dim) -> dict[str, Any]:
    original = params.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = params.get("factor") or config["max_position_embeddings"] / original
    attention = params.get("attention_factor")
    if attention is None:
        scale, scale_all = params.get("mscale"), params.get("mscale_all_dim")
        paired = bool(scale and scale_all)
        attention = _mscale(factor, scale) / _mscale(factor, scale_all) if paired else _mscale(factor, 1.0)
    return {
        "factor": float(factor),
        "original_max": int(original),
        "beta_fast": float(params.get("beta_fast") or 32),
        "beta_slow": float(params.get("beta_slow") or 1),
        "truncate": bool(params.get("truncate", True)),
        "attention_factor": float(attention),
    }


def _read_longrope(config, params, dim) -> dict[str, Any]:
    short, long = _required(params, "short_factor", "long_factor")
    for name, values in (("short_factor", short), ("long_factor", long)):
        if len(values) != dim // 2:
            raise ValueError(f"{name} has {len(values)} entries for {dim // 2} rotated pairs.")
    longest = config["max_position_embeddings"]
    declared = config.get("original_max_position_embeddings")
    original = declared or params.get("original_max_position_embeddings") or longest
    factor = longest / declared if declared else params.get("factor") or longest / original
    attention = params.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "factor": float(factor),
        "original_max": int(original),
        "attention_factor": float(attention),
        "short_factor": tuple(map(float, short)),
        "long_factor": tuple(map(float, long)),
    }


_EXTENSIONS = {
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


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
