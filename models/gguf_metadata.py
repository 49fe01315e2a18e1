"""What a GGUF file says about its model: metadata by key, the configuration, the names of its tensors."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from models.config import ModelConfig
from models.names import Names
from models.rope import RopeConfig

# GGUF architecture -> model_type of config.json.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
# GGUF key (without the architecture) -> name in config.json.
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GPT2_SIZES = {
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "attention.head_count": "n_head",
    "feed_forward_length": "n_inner",
    "context_length": "n_positions",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_ROPE = {  # GGUF key under rope.scaling -> rope parameter
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
}
# Tensors that hold divisors of the rope frequencies: Llama 3's scaling, and longrope's two sets.
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}  # the one size whose attention scale does not follow from head_dim

_LAYER = {
    "attn_norm": "input_norm",
    "attn_q": "attn.q_proj",
    "attn_k": "attn.k_proj",
    "attn_v": "attn.v_proj",
    "attn_output": "attn.o_proj",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "post_attention_norm": "post_attn_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_mlp_norm",
}
_FUSED = {name: path for name, path in _LAYER.items() if name not in ("attn_q", "attn_k", "attn_v")}
_FUSED["attn_qkv"] = "attn.[q_proj|k_proj|v_proj]"
_LAYERS = {  # by family, where it differs
    "gpt2": _FUSED,
    "phi3": {**_FUSED, "ffn_up": "mlp.[gate_proj|up_proj]"},
}
_OUTER = {
    "token_embd": "embed_tokens",
    "position_embd": "embed_positions",
    "output_norm": "final_norm",
    "output": "lm_head",
}


def names(config: ModelConfig) -> Names:
    """Names of a GGUF file's tensors."""
    layer = _LAYERS.get(config.family, _LAYER)
    tables = {**_OUTER, **{f"blk.{{}}.{name}": f"layers_{{}}.{path}" for name, path in layer.items()}}
    patterns = {f"{name}.{kind}": f"{path}.{kind}" for name, path in tables.items() for kind in ("weight", "bias")}
    return Names(patterns, ignored=r"^rope_(freqs|factors_long|factors_short)\.weight$")


class Fields(Mapping[str, Any]):
    """Metadata by key, read when asked for."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].contents()

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def read_config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> ModelConfig:
    """Build the configuration from metadata and tensors by name.

    Raises:
      ValueError: If the architecture is unknown or a size is missing.
    """
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}.")
    if "token_embd.weight" not in tensors:
        raise ValueError("has no tensor 'token_embd.weight'.")
    sizes = _GPT2_SIZES if architecture == "gpt2" else _SIZES
    own = {key: fields[f"{architecture}.{key}"] for key in sizes if f"{architecture}.{key}" in fields}
    listed = [f"{architecture}.{key}" for key, value in own.items() if isinstance(value, list)]
    if listed:
        raise ValueError(f"{listed[0]} differs from layer to layer, which is not supported.")
    values = {sizes[key]: value or None for key, value in own.items()}  # 0 stands for "none" in GGUF
    values |= {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": _tied(tensors),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    if architecture != "gpt2":
        values |= _rope(architecture, fields, tensors, values)
    if architecture in _GEMMA_27B_LAYERS:
        wide = values["num_hidden_layers"] == _GEMMA_27B_LAYERS[architecture]
        per_head = int(values["hidden_size"] or 0) // int(values["num_attention_heads"] or 1)
        values["query_pre_attn_scalar"] = per_head if wide else values.get("head_dim")
    return _adjusted(ModelConfig.from_hf(values), tensors)


def _tied(tensors: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding: absent, or written a second time."""
    table, head = tensors["token_embd.weight"], tensors.get("output.weight")
    return head is None or (table.tensor_type == head.tensor_type and np.array_equal(table.data, head.data))


def _rope(
    architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Rope parameters as config.json has them."""
    found: dict[str, Any] = {}
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    rotated = fields.get(f"{architecture}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        found["partial_rotary_factor"] = rotated / head_dim
    prefix = f"{architecture}.rope.scaling."
    scaling = {ours: fields[prefix + key] for key, ours in _ROPE.items() if prefix + key in fields}
    if LONG in tensors and SHORT in tensors:
        original = scaling.get("original_max_position_embeddings")
        found["original_max_position_embeddings"] = original
        scaling |= {
            "rope_type": "longrope",
            "long_factor": _floats(tensors[LONG]),
            "short_factor": _floats(tensors[SHORT]),
        }
    if scaling.get("rope_type", "none") != "none":
        found["rope_scaling"] = scaling
    return found


def _adjusted(config: ModelConfig, tensors: Mapping[str, Any]) -> ModelConfig:
    """The configuration as converted: the norm's one is in its weights, frequencies may have divisors."""
    if config.norm == "rms_plus_one":
        config = dataclasses.replace(config, norm="rms")
    if config.qkv_bias and config.o_bias and config.family != "gpt2":
        config = dataclasses.replace(config, o_bias="blk.0.attn_output.bias" in tensors)
    if FREQUENCIES in tensors:
        divisors = _floats(tensors[FREQUENCIES])
        config = dataclasses.replace(config, ropes=tuple(_divided(rope, divisors) for rope in config.ropes))
    return config


def _divided(rope: RopeConfig, divisors: tuple[float, ...]) -> RopeConfig:
    """The same rope with each frequency divided."""
    return dataclasses.replace(rope, kind="longrope", short_factor=divisors, long_factor=divisors)


def _floats(tensor: Any) -> tuple[float, ...]:
    return tuple(map(float, np.asarray(tensor.data).reshape(-1)))
