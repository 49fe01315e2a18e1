"""GGUF files: configuration, tokenizer and weights, dequantised a tensor at a time."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from models.assemble import assemble
from models.config import ModelConfig
from models.errors import CheckpointError
from models.rope import RopeConfig
from models.tokenizer import Tokenizer

# Our config's source: GGUF key (without the architecture) -> name in config.json.
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
_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_TENSORS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_TENSORS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROPE_FREQS = "rope_freqs.weight"  # divisors of the frequencies, where Llama 3's scaling is stored


def load(file: Path, dtype: Any) -> tuple[ModelConfig, Any, Tokenizer]:
    """Read config, parameters and tokenizer.

    Raises:
      CheckpointError: Naming the file, and the tensor where there is one.
    """
    reader = _open(file)
    config = _config(file, reader)
    try:
        tokenizer = Tokenizer.from_gguf(_Fields(reader))
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{file}: cannot build the tokenizer: {error}") from error
    return config, assemble(config, _tensors(file, reader, config), dtype), tokenizer


def load_config(file: Path) -> ModelConfig:
    """Read only the configuration."""
    return _config(file, _open(file))


class _Fields(dict):
    """Metadata by key, read when asked for."""

    def __init__(self, reader: Any) -> None:
        super().__init__()
        self._fields = reader.fields

    def __missing__(self, key: str) -> Any:
        self[key] = self._fields[key].contents()
        return self[key]

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        return self[key] if key in self else default


def _open(file: Path) -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file}: reading GGUF needs the package gguf; run: pip install gguf")
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"{file}: not a whole GGUF file: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def _config(file: Path, reader: Any) -> ModelConfig:
    fields = _Fields(reader)
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{file}: architecture {architecture!r} is not supported; supported: {', '.join(_ARCHITECTURES)}."
        )
    values = {
        name: fields[f"{architecture}.{key}"] for key, name in _SIZES.items() if f"{architecture}.{key}" in fields
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values["model_type"] = _ARCHITECTURES[architecture]
    values["tie_word_embeddings"] = "output.weight" not in tensors
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{file}: no tensor 'token_embd.weight'.")
    values["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    for name in ("bos", "eos"):
        if f"tokenizer.ggml.{name}_token_id" in fields:
            values[f"{name}_token_id"] = fields[f"tokenizer.ggml.{name}_token_id"]
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        values["rope_scaling"] = {
            "rope_type": scaling,
            "factor": fields.get(f"{architecture}.rope.scaling.factor"),
            "original_max_position_embeddings": fields.get(f"{architecture}.rope.scaling.original_context_length"),
        }
    try:
        config = ModelConfig.from_hf(values)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if config.norm == "rms_plus_one":  # the conversion added the one to the weights
        config = dataclasses.replace(config, norm="rms")
    if _ROPE_FREQS in tensors:
        divisors = tuple(map(float, np.asarray(tensors[_ROPE_FREQS].data)))
        config = dataclasses.replace(config, ropes=tuple(_divided(rope, divisors) for rope in config.ropes))
    return config


def _divided(rope: RopeConfig, divisors: tuple[float, ...]) -> RopeConfig:
    """The same rope with each frequency divided."""
    return dataclasses.replace(rope, kind="longrope", short_factor=divisors, long_factor=divisors)


def _tensors(file: Path, reader: Any, config: ModelConfig) -> Iterator[tuple[str, str, np.ndarray]]:
    import gguf

    names = {**_TENSORS, **(_GEMMA_TENSORS if config.post_norms else {})}
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FREQS:
            continue
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{file}: tensor {tensor.name!r}: {error}") from error
        yield str(file), _hf_name(tensor.name, names), _unpermute(config)(tensor.name, array)


def _hf_name(name: str, names: dict[str, str]) -> str:
    """blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight; unknown names stay, to be reported."""
    *parents, tensor, kind = name.split(".")
    if tensor not in names:
        return name
    prefix = f"layers.{parents[1]}." if len(parents) == 2 and parents[0] == "blk" else ""
    return f"{prefix}{names[tensor]}.{kind}"


def _unpermute(config: ModelConfig) -> Callable[[str, np.ndarray], np.ndarray]:
    """Undo the interleaving of rotated pairs that llama.cpp applies to rows of q and k of Llama models."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if config.family == "llama" else {}

    def undo(name: str, array: np.ndarray) -> np.ndarray:
        count = next((n for part, n in heads.items() if f".{part}." in name), None)
        if count is None:
            return array
        turned = array.reshape(count, array.shape[0] // count // 2, 2, *array.shape[1:]).swapaxes(1, 2)
        return turned.reshape(array.shape)

    return undo
