"""GGUF files: configuration, tokenizer and weights, dequantised a tensor at a time."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models import gguf_metadata, gguf_tokenizer
from models.assemble import assemble
from models.config import ModelConfig
from models.errors import CheckpointError
from models.tokenizer import Tokenizer


def load(file: Path, dtype: Any) -> tuple[ModelConfig, Any, Tokenizer | None]:
    """Read config, parameters and tokenizer (None if the file has none).

    Raises:
      CheckpointError: Naming the file, and the tensor where there is one.
    """
    reader = _open(file)
    config = _config(file, reader)
    try:
        tokenizer = gguf_tokenizer.read(gguf_metadata.Fields(reader))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot build the tokenizer: {error}") from error
    params = assemble(config, gguf_metadata.names(config), _tensors(file, reader, config), dtype, file)
    return config, params, tokenizer


def load_config(file: Path) -> ModelConfig:
    """Read only the configuration."""
    return _config(file, _open(file))


def _open(file: Path) -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file}: reading GGUF needs the package gguf; run: pip install gguf")
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: damaged, or not a whole GGUF file: {why}") from error


def _config(file: Path, reader: Any) -> ModelConfig:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        return gguf_metadata.read_config(gguf_metadata.Fields(reader), tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _tensors(file: Path, reader: Any, config: ModelConfig) -> Iterator[tuple[Path, str, np.ndarray]]:
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if config.family == "llama" else {}
    for tensor in reader.tensors:
        yield file, tensor.name, _unpermute(heads, tensor.name, _dequantise(file, tensor))


def _dequantise(file: Path, tensor: Any) -> np.ndarray:
    """The tensor as float32 in memory of its own: a view into the file would change, or fault, with the file."""
    import gguf

    try:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        kind = tensor.tensor_type.name
        raise CheckpointError(f"{file}: tensor {tensor.name!r} of type {kind} cannot be read: {error}") from error
    return np.array(array) if isinstance(array, np.memmap) else array


def _unpermute(heads: Mapping[str, int], name: str, array: np.ndarray) -> np.ndarray:
    """Undo the interleaving of rotated pairs that llama.cpp applies to rows of q and k of Llama models."""
    count = next((n for part, n in heads.items() if f".{part}." in name), None)
    if count is None or array.shape[0] % (2 * count):
        return array  # rows that fit no heads are reported where shapes are checked
    pairs = array.reshape(count, array.shape[0] // count // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
