"""Rope parameters of config.json: `rope_parameters`, or the older `rope_theta` with `rope_scaling`.

Defaults and precedence are those of transformers 5.23, which the released configurations are read with.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from models.rope import RopeConfig

Params = dict[str, Any]


def one_rope(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """Read the rope of a model that has one kind for all layers.

    Raises:
      ValueError: If the rope type is unknown, or a parameter is missing or impossible.
    """
    old = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    params = _given(config, "rope_parameters")
    params = {"rope_theta": 10_000.0, **old, **params, **_given(config, "rope_scaling")}
    if config["model_type"] == "phi3":
        params["rope_type"] = {"su": "longrope", "yarn": "longrope"}.get(_kind(params), _kind(params))  # earlier names
    elif _number(params, "partial_rotary_factor", 1.0) != 1:
        raise ValueError(
            f"partial_rotary_factor={params['partial_rotary_factor']} with model_type={config['model_type']!r} is not "
            "supported; only phi3 rotates a part of a head."
        )
    return _read(params, head_dim, config["max_position_embeddings"], config.get("original_max_position_embeddings"))


def local_and_global_rope(config: Mapping[str, Any], head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """Read the ropes of windowed and of global layers; a scaling in the old spelling concerns the global ones.

    Raises:
      ValueError: As `one_rope`.
    """
    nested = _given(config, "rope_parameters")
    if "rope_theta" in nested or "rope_type" in nested:
        nested = {"full_attention": nested}
    local = {"rope_theta": config.get("rope_local_base_freq") or 10_000.0, **_given(nested, "sliding_attention")}
    whole = {"rope_theta": config.get("rope_theta") or 1_000_000.0, **_given(nested, "full_attention")}
    whole |= _given(config, "rope_scaling")
    longest = config["max_position_embeddings"]
    return _read(local, head_dim, longest), _read(whole, head_dim, longest)


def context(longest: int, rope: RopeConfig) -> int:
    """Tokens that a model reads: some scalings extend what `max_position_embeddings` says."""
    if rope.kind in ("linear", "dynamic"):
        return int(longest * rope.factor)
    return max(longest, int(rope.original_max * rope.factor)) if rope.kind == "yarn" else longest


def _read(params: Params, head_dim: int, longest: int, original: int | None = None) -> RopeConfig:
    """Turn parameters in the new spelling into a RopeConfig; `original` goes before the parameters' own."""
    kind = _kind(params)
    if kind not in _KINDS:
        raise ValueError(f"rope_type={kind!r} is not supported; supported: {', '.join(_KINDS)}.")
    dim = int(head_dim * _number(params, "partial_rotary_factor", 1.0))
    if not 2 <= dim <= head_dim or dim % 2:
        raise ValueError(f"head_dim={head_dim} rotates {dim} dimensions; they must be even and from 2 to head_dim.")
    params = {"original_max_position_embeddings": longest, **params}
    if original is not None:
        params["original_max_position_embeddings"] = original
    options = _KINDS[kind](params, longest, dim)
    return RopeConfig(kind=kind, theta=_number(params, "rope_theta"), dim=dim, **options)


def _default(params: Params, longest: int, dim: int) -> Params:
    return {}


def _linear(params: Params, longest: int, dim: int) -> Params:
    return {"factor": _number(params, "factor")}


def _dynamic(params: Params, longest: int, dim: int) -> Params:
    return {"factor": _number(params, "factor"), "original_max": longest}


def _llama3(params: Params, longest: int, dim: int) -> Params:
    low, high = _number(params, "low_freq_factor"), _number(params, "high_freq_factor")
    if low >= high:
        raise ValueError(f"low_freq_factor={low} must be less than high_freq_factor={high}.")
    return {
        "factor": _number(params, "factor"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max": _original(params),
    }


def _yarn(params: Params, longest: int, dim: int) -> Params:
    original = _original(params)
    factor = _number(params, "factor", longest / original)
    scales = _number(params, "mscale", 0.0), _number(params, "mscale_all_dim", 0.0)
    attention = _mscale(factor, scales[0]) / _mscale(factor, scales[1]) if all(scales) else _mscale(factor, 1.0)
    return {
        "factor": factor,
        "original_max": original,
        "beta_fast": _number(params, "beta_fast", 32.0),
        "beta_slow": _number(params, "beta_slow", 1.0),
        "truncate": bool(params.get("truncate", True)),
        "attention_factor": _number(params, "attention_factor", attention),
    }


def _longrope(params: Params, longest: int, dim: int) -> Params:
    original = _original(params)
    factor = _number(params, "factor", longest / original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "factor": factor,
        "original_max": original,
        "attention_factor": _number(params, "attention_factor", attention),
        "short_factor": _divisors(params, "short_factor", dim // 2),
        "long_factor": _divisors(params, "long_factor", dim // 2),
    }


_KINDS: dict[str, Callable[[Params, int, int], Params]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _kind(params: Params) -> str:
    kind = params.get("rope_type") or params.get("type") or "default"
    return "default" if kind == "mrope" else kind  # sections of equal positions, for text


def _given(config: Mapping[str, Any], name: str) -> Params:
    """An object of parameters without its nulls; empty if there is none."""
    params = config.get(name) or {}
    if not isinstance(params, Mapping):
        raise ValueError(f"{name}={params!r} must be an object of rope parameters.")
    return {key: value for key, value in params.items() if value is not None}


def _number(params: Params, name: str, default: float | None = None) -> float:
    """A number above zero, or at zero where that is the default."""
    value = params.get(name, default)
    if value is None:
        raise ValueError(f"rope parameters {params} lack {name!r}.")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (value == 0 and default != 0):
        raise ValueError(f"rope parameter {name}={value!r} must be a positive number.")
    return float(value)


def _original(params: Params) -> int:
    return int(_number(params, "original_max_position_embeddings"))


def _divisors(params: Params, name: str, num_pairs: int) -> tuple[float, ...]:
    values = params.get(name)
    if not isinstance(values, (list, tuple)) or len(values) != num_pairs:
        raise ValueError(f"rope parameter {name}={values!r} must be a list of {num_pairs} numbers, one a rotated pair.")
    return tuple(map(float, values))


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
