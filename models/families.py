"""What config.json says in each supported family, as fields of `ModelConfig`.

A configuration may omit a field that equals the default of its class in transformers; `_FAMILIES` has those defaults
(as of transformers 5.23). Sizes are never guessed, but for Gemma 3, whose nested `text_config` omits them.
"""

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from models.rope_config import context, local_and_global_rope, one_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
_ENDINGS = ("ForCausalLM", "Model", "TextModel", "LMHeadModel", "ForConditionalGeneration")


class ConfigError(ValueError):
    """A configuration that cannot be read or is not supported."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How to read one `model_type`: its classes start with `prefix`; `defaults` fill in what config.json omits."""

    prefix: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    defaults: Mapping[str, Any]


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ModelConfig` for a config.json of either spelling.

    Raises:
      ValueError: Naming the field, its value and what is supported.
    """
    config = _text_config(config)
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise ConfigError(f"model_type={kind!r} is not supported; supported: {', '.join(sorted(_FAMILIES))}.")
    family = _FAMILIES[kind]
    _check_supported(config, family)
    return family.read({**family.defaults, **config})


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a Gemma 3 that also reads images; the whole decides what ends a text."""
    text = config.get("text_config")
    if not isinstance(text, Mapping) or config.get("model_type", "gemma3") != "gemma3":
        return config
    names = ("architectures", "bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")
    outer = {name: config[name] for name in names if config.get(name) is not None}
    return {"model_type": "gemma3_text", **text, **outer}


def _check_supported(config: Mapping[str, Any], family: Family) -> None:
    known = [(family.prefix + ending).lower() for ending in _ENDINGS]  # LLaMAForCausalLM was written, too
    for name in config.get("architectures") or ():
        if name.lower() not in known:
            raise ConfigError(
                f"architectures={name!r} with model_type={config['model_type']!r} is not supported; "
                f"supported: {', '.join(family.prefix + ending for ending in _ENDINGS[:2])}."
            )
    for name in ("quantization_config", "use_bidirectional_attention", "add_cross_attention"):
        if config.get(name):
            raise ConfigError(f"{name}={config[name]!r} is not supported; leave it out or use another checkpoint.")


def _size(config: Mapping[str, Any], name: str) -> int:
    """A number that must be there and be positive."""
    value = config.get(name)
    if value is None:
        raise ConfigError(f"config.json of model_type={config['model_type']!r} lacks {name!r}.")
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a positive integer.")
    return int(value)


def _activation(config: Mapping[str, Any], name: str) -> str:
    value = config.get(name)
    if value not in ACTIVATIONS:
        raise ConfigError(f"{name}={value!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[value]


def _ends(config: Mapping[str, Any]) -> dict[str, Any]:
    eos = config.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    return {"bos_id": config.get("bos_token_id"), "eos_ids": eos_ids}


def _head_dim(config: Mapping[str, Any], heads: str, width: str) -> int:
    """Head size: as given, or an equal share of the model's width."""
    if config.get("head_dim") is not None:
        return _size(config, "head_dim")
    if _size(config, width) % _size(config, heads):
        raise ConfigError(f"{width}={config[width]} must be a multiple of {heads}={config[heads]}; or give head_dim.")
    return config[width] // config[heads]


def _windows(config: Mapping[str, Any], local: Callable[[int], bool] = lambda i: True) -> tuple[int | None, ...]:
    """Sliding window of each layer: local ones are named by `layer_types`, else by the family's rule."""
    num_layers = _size(config, "num_hidden_layers")
    window = None if config.get("sliding_window") is None else _size(config, "sliding_window")
    types = config.get("layer_types")
    if types is None:
        return tuple(window if local(i) else None for i in range(num_layers))
    if len(types) != num_layers:
        raise ConfigError(f"layer_types has {len(types)} entries for num_hidden_layers={num_layers}.")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"layer_types={kind!r} is not supported; supported: full_attention, sliding_attention.")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _decoder(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """What all families with rotary positions share; `changes` are the family's own fields."""
    num_layers, num_heads = _size(config, "num_hidden_layers"), _size(config, "num_attention_heads")
    windows = changes.setdefault("sliding_windows", (None,) * num_layers)
    head_dim = _head_dim(config, "num_attention_heads", "hidden_size")
    longest = _size(config, "max_position_embeddings")
    if "ropes" not in changes:
        rope = one_rope(config, head_dim)
        longest, changes["ropes"] = context(longest, rope), (rope,) * len(windows)
    return {
        "family": config["model_type"],
        "num_layers": num_layers,
        "model_dim": _size(config, "hidden_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads
        if config.get("num_key_value_heads") is None
        else _size(config, "num_key_value_heads"),
        "head_dim": head_dim,
        "ffn_dim": _size(config, "intermediate_size"),
        "vocab_size": _size(config, "vocab_size"),
        "max_positions": longest,
        "norm_eps": float(config["rms_norm_eps"]),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        **({} if "activation" in changes else {"activation": _activation(config, "hidden_act")}),
        **_ends(config),
        **changes,
    }


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return _decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    return _decoder(config, sliding_windows=_windows(config))


def _qwen(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    if not config.get("use_sliding_window"):
        config = {**config, "sliding_window": None}
    return _decoder(config, sliding_windows=_windows(config, lambda i: i >= config["max_window_layers"]), **changes)


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    return _qwen(config, qkv_bias=True)


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return _qwen(config, qk_norm=True, qkv_bias=bias, o_bias=bias)


def _gemma(config: Mapping[str, Any], local: Callable[[int], bool], **changes: Any) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return _decoder(
        config,
        norm="rms_plus_one",
        activation=_activation(config, "hidden_activation"),
        embed_scale=float(_size(config, "hidden_size")) ** 0.5,
        post_norms=True,
        sm_scale=float(_size(config, "query_pre_attn_scalar")) ** -0.5,
        sliding_windows=_windows(config, local),
        qkv_bias=bias,
        o_bias=bias,
        logit_soft_cap=config["final_logit_softcapping"],
        **changes,
    )


def _gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    return _gemma(config, lambda i: i % 2 == 0, attn_soft_cap=config["attn_logit_softcapping"])


def _gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read a text-only Gemma 3, which caps no attention logits: transformers ignores its `attn_logit_softcapping`."""
    every = config.get("sliding_window_pattern") or 6
    types = config.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention"
        for i in range(_size(config, "num_hidden_layers"))
    ]
    _size(config, "max_position_embeddings")
    local, whole = local_and_global_rope(config, _size(config, "head_dim"))
    ropes = tuple(local if kind == "sliding_attention" else whole for kind in types)
    return _gemma({**config, "layer_types": types}, lambda i: True, qk_norm=True, ropes=ropes)


def _phi3(config: Mapping[str, Any]) -> dict[str, Any]:
    return _decoder(config, sliding_windows=_windows(config))


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise ConfigError("scale_attn_by_inverse_layer_idx=True is not supported; only False is.")
    model_dim, num_heads = _size(config, "n_embd"), _size(config, "n_head")
    return {
        "family": "gpt2",
        "num_layers": _size(config, "n_layer"),
        "model_dim": model_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": _head_dim(config, "n_head", "n_embd"),
        "ffn_dim": 4 * model_dim if config.get("n_inner") is None else _size(config, "n_inner"),
        "vocab_size": _size(config, "vocab_size"),
        "max_positions": _size(config, "n_positions"),
        "norm": "layer",
        "norm_eps": float(config["layer_norm_epsilon"]),
        "activation": _activation(config, "activation_function"),
        "gated_mlp": False,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "positions": "learned",
        "sm_scale": None if config.get("scale_attn_weights", True) else 1.0,
        "sliding_windows": (None,) * _size(config, "n_layer"),
        **_ends(config),
    }


_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
_QWEN = {**_COMMON, "max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
    **_COMMON,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_FAMILIES = {
    "llama": Family(
        "Llama", _llama, {**_COMMON, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
    ),
    "mistral": Family(
        "Mistral",
        _mistral,
        {
            **_COMMON,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen2": Family("Qwen2", _qwen2, _QWEN),
    "qwen3": Family("Qwen3", _qwen3, {**_QWEN, "head_dim": 128}),
    "gemma2": Family(
        "Gemma2",
        _gemma2,
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
    ),
    "gemma3_text": Family(
        "Gemma3",
        _gemma3,
        {
            **_GEMMA,
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
            "final_logit_softcapping": None,
        },
    ),
    "phi3": Family(
        "Phi3",
        _phi3,
        {
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 32_000,
        },
    ),
    "gpt2": Family(
        "GPT2",
        _gpt2,
        {
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "bos_token_id": 50_256,
            "eos_token_id": 50_256,
        },
    ),
}
