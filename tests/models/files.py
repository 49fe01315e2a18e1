"""Writers of small checkpoints in the formats that `models.load` reads."""

import json
import math
import shutil
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
_SIZES = {  # config.json -> writer's method
    "max_position_embeddings": "add_context_length",
    "n_positions": "add_context_length",
    "hidden_size": "add_embedding_length",
    "n_embd": "add_embedding_length",
    "num_hidden_layers": "add_block_count",
    "n_layer": "add_block_count",
    "intermediate_size": "add_feed_forward_length",
    "num_attention_heads": "add_head_count",
    "n_head": "add_head_count",
    "num_key_value_heads": "add_head_count_kv",
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "layer_norm_epsilon": "add_layer_norm_eps",
    "head_dim": "add_key_length",
    "sliding_window": "add_sliding_window",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "eos_token_id": "add_eos_token_id",
    "bos_token_id": "add_bos_token_id",
}


def read(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Config and tensors of a golden checkpoint."""
    return json.loads((GOLDEN / name / "config.json").read_text()), load_file(GOLDEN / name / "model.safetensors")


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray], *, shards: int = 1) -> Path:
    """Write a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    placed = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        placed |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def copy(name: str, folder: Path) -> Path:
    """A golden checkpoint that a test may damage."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, folder / file)
    return folder


def to_gguf(file: Path, architecture: str, config: dict, tensors: dict[str, np.ndarray], kinds=(), more=None) -> Path:
    """Write a GGUF file as llama.cpp's converter does.

    Args:
      file: To write.
      architecture: Of GGUF.
      config: config.json.
      tensors: By their Hugging Face names.
      kinds: Pairs (part of a GGUF name, type); a tensor is written in the first that fits, else in float32.
      more: Called with the writer, for further metadata and tensors.
    """
    writer = gguf.GGUFWriter(file, architecture)
    for name, method in _SIZES.items():
        if config.get(name) is not None:
            getattr(writer, method)(config[name])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("full_attention", rope).get("rope_theta", 10_000.0))
    layers = config.get("num_hidden_layers") or config["n_layer"]
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, layers)
    for name, tensor in tensors.items():
        theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = _converted(architecture, config, name, np.asarray(tensor, np.float32))
        kind = next((kind for part, kind in kinds if part in theirs), gguf.GGMLQuantizationType.F32)
        writer.add_tensor(theirs, gguf.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    if more:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _converted(architecture: str, config: dict, name: str, tensor: np.ndarray) -> np.ndarray:
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.T
    return tensor


def llama3_divisors(rope: dict, head_dim: int) -> np.ndarray:
    """What the converter stores for Llama 3's scaling: a divisor of each frequency."""
    original, low, high = (rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / head_dim)
        smooth = min(max((original / wavelength - low) / (high - low), 0), 1)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def cast(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """All tensors in another dtype."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return {name: tensor.astype(kind) for name, tensor in tensors.items()}
