"""What a model is: sizes and switches, read from a Hugging Face config.json of either spelling."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import kvcomp_jax as kvc
from models.rope import RopeConfig, rope_from_hf

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


class ConfigError(ValueError):
    """A configuration that cannot be read or is not supported."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes in elements, one transformer for all families."""

    family: str
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_positions: int
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_eps: float = 1e-6
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # Gemma 2 and 3: norms after attention and MLP as well
    tie_embeddings: bool = False
    embed_scale: float = 1.0
    positions: Literal["rope", "learned"] = "rope"
    position_offset: int = 0  # OPT's table starts two rows late
    ropes: tuple[RopeConfig, ...] = ()  # one a layer
    sliding_windows: tuple[int | None, ...] = ()  # one a layer
    sm_scale: float | None = None
    attn_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def layout(self) -> kvc.Layout:
        """What a cache plan needs to know."""
        return kvc.Layout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            sliding_windows=self.sliding_windows,
            max_positions=self.max_positions,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json.

        Raises:
          ConfigError: If the architecture, rope type or activation is unknown, or a size is missing or impossible.
        """
        config = _text_config(config)
        family = config.get("model_type")
        if family not in _FAMILIES:
            raise ConfigError(f"model_type={family!r} is not supported; supported: {', '.join(sorted(_FAMILIES))}.")
        made = _FAMILIES[family](config)
        if made.num_heads % made.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={made.num_heads} must be a multiple of num_key_value_heads={made.num_kv_heads}."
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Undo `to_dict`."""
        values = dict(values)
        values["ropes"] = tuple(RopeConfig.from_dict(rope) for rope in values["ropes"])
        values["sliding_windows"] = tuple(values["sliding_windows"])
        values["eos_ids"] = tuple(values["eos_ids"])
        return cls(**values)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal config."""
    return config["text_config"] if isinstance(config.get("text_config"), Mapping) else config


def _need(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise ConfigError(f"config.json of model_type={config.get('model_type')!r} lacks {name!r}.")
    return config[name]


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[name]


def _eos(config: Mapping[str, Any]) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    return () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)


def _windows(config: Mapping[str, Any], window: int | None, local: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Sliding window of each layer, from `layer_types` where the config has them, else by the family's rule."""
    num_layers = _need(config, "num_hidden_layers")
    types = config.get("layer_types")
    if types is not None and len(types) != num_layers:
        raise ConfigError(f"layer_types has {len(types)} entries for num_hidden_layers={num_layers}.")
    is_local = [t == "sliding_attention" for t in types] if types else [local(i) for i in range(num_layers)]
    return tuple(window if here else None for here in is_local)


def _decoder(config: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """What all rope families share; `changes` are the family's own."""
    num_layers, model_dim = _need(config, "num_hidden_layers"), _need(config, "hidden_size")
    num_heads = _need(config, "num_attention_heads")
    windows = changes.pop("sliding_windows", (None,) * num_layers)
    values: dict[str, Any] = dict(
        family=config["model_type"],
        num_layers=num_layers,
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or model_dim // num_heads,
        ffn_dim=_need(config, "intermediate_size"),
        vocab_size=_need(config, "vocab_size"),
        max_positions=_need(config, "max_position_embeddings"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=_activation(config.get("hidden_act") or config.get("hidden_activation") or "silu"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        sliding_windows=windows,
        bos_id=config.get("bos_token_id"),
        eos_ids=_eos(config),
    )
    values.update(changes)
    if "ropes" not in values:
        values["ropes"] = tuple(rope_from_hf(config, values["head_dim"], local=w is not None) for w in windows)
    return ModelConfig(**values)


def _llama(config: Mapping[str, Any]) -> ModelConfig:
    bias = bool(config.get("attention_bias", False))
    return _decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral(config: Mapping[str, Any]) -> ModelConfig:
    return _decoder(config, sliding_windows=_windows(config, config.get("sliding_window"), lambda i: True))


def _qwen(config: Mapping[str, Any], **changes: Any) -> ModelConfig:
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    first = config.get("max_window_layers", 28)
    return _decoder(config, sliding_windows=_windows(config, window, lambda i: i >= first), **changes)


def _qwen2(config: Mapping[str, Any]) -> ModelConfig:
    return _qwen(config, qkv_bias=True)


def _qwen3(config: Mapping[str, Any]) -> ModelConfig:
    bias = bool(config.get("attention_bias", False))
    return _qwen(config, qk_norm=True, head_dim=config.get("head_dim") or 128, qkv_bias=bias, o_bias=bias)


def _gemma(config: Mapping[str, Any], *, window: int, local: Callable[[int], bool], **changes: Any) -> ModelConfig:
    bias = bool(config.get("attention_bias", False))
    return _decoder(
        config,
        norm="rms_plus_one",
        head_dim=config.get("head_dim") or 256,
        activation=_activation(config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        embed_scale=float(_need(config, "hidden_size")) ** 0.5,
        post_norms=True,
        sm_scale=float(config.get("query_pre_attn_scalar") or 256) ** -0.5,
        sliding_windows=_windows(config, config.get("sliding_window") or window, local),
        qkv_bias=bias,
        o_bias=bias,
        attn_soft_cap=config.get("attn_logit_softcapping", changes.pop("attn_soft_cap", None)),
        logit_soft_cap=config.get("final_logit_softcapping", changes.pop("logit_soft_cap", None)),
        **changes,
    )


def _gemma2(config: Mapping[str, Any]) -> ModelConfig:
    return _gemma(config, window=4096, local=lambda i: i % 2 == 0, attn_soft_cap=50.0, logit_soft_cap=30.0)


def _gemma3(config: Mapping[str, Any]) -> ModelConfig:
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    defaults = {  # released checkpoints omit these
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
    }
    return _gemma({**defaults, **config}, window=4096, local=lambda i: (i + 1) % every != 0, qk_norm=True)


def _phi3(config: Mapping[str, Any]) -> ModelConfig:
    return _decoder(config, sliding_windows=_windows(config, config.get("sliding_window"), lambda i: True))


def _gpt2(config: Mapping[str, Any]) -> ModelConfig:
    model_dim, num_heads = _need(config, "n_embd"), _need(config, "n_head")
    unusual = ("scale_attn_by_inverse_layer_idx", "add_cross_attention")
    for name in unusual:
        if config.get(name):
            raise ConfigError(f"{name}={config[name]!r} of GPT-2 is not supported.")
    return ModelConfig(
        family="gpt2",
        num_layers=_need(config, "n_layer"),
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=model_dim // num_heads,
        ffn_dim=config.get("n_inner") or 4 * model_dim,
        vocab_size=_need(config, "vocab_size"),
        max_positions=_need(config, "n_positions"),
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=_activation(config.get("activation_function", "gelu_new")),
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        positions="learned",
        sm_scale=None if config.get("scale_attn_weights", True) else 1.0,
        sliding_windows=(None,) * _need(config, "n_layer"),
        bos_id=config.get("bos_token_id"),
        eos_ids=_eos(config),
    )


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}
