"""Hugging Face folders: config.json and safetensors, single or sharded. Nothing is executed, nothing unpickled."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from models.assemble import assemble
from models.config import ModelConfig
from models.errors import CheckpointError
from models.names import hugging_face

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_config(folder: Path) -> ModelConfig:
    """Read config.json; end-of-text ids of generation_config.json are added.

    Raises:
      CheckpointError: If it is absent, no JSON, or not supported.
    """
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder}: holds no config.json, so it is neither a Hugging Face model nor one of ours.")
    values = read_json(file)
    more = folder / "generation_config.json"
    if more.exists():
        values = _with_eos(values, read_json(more).get("eos_token_id"))
    try:
        return ModelConfig.from_hf(values)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def load_params(folder: Path, config: ModelConfig, dtype: Any) -> Any:
    """Read the parameters of a folder, one tensor at a time.

    Raises:
      CheckpointError: See `assemble`; also if a file is truncated, absent, or pickled.
    """
    return assemble(config, hugging_face(config), _tensors(folder), dtype, folder)


def read_json(file: Path) -> dict[str, Any]:
    """Parse a file with a JSON object, or raise CheckpointError that names it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(values).__name__}, expected an object.")
    return values


def _with_eos(values: Mapping[str, Any], more: Any) -> dict[str, Any]:
    """The configuration with more end-of-text ids, in its text part too where it has one."""
    text = values.get("text_config")
    parts = [values, text] if isinstance(text, Mapping) else [values]
    ids = sorted({i for part in parts for i in _listed(part.get("eos_token_id"))} | set(_listed(more)))
    inner = {"text_config": {**text, "eos_token_id": ids}} if isinstance(text, Mapping) else {}
    return {**values, "eos_token_id": ids, **inner}


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def _tensors(folder: Path) -> Iterator[tuple[Path, str, np.ndarray]]:
    for file, names in _files(folder).items():
        held = _held(file)
        for name in held if names is None else names:
            if name not in held:
                raise CheckpointError(f"{file}: no tensor {name!r}, which {INDEX} places here.")
            # Opened anew for each tensor: pages read through a mapping count as the process's until it is closed.
            with safe_open(file, framework="numpy") as tensors:
                tensor = _read(file, name, tensors)
            yield file, name, tensor


def _held(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            return sorted(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error


def _read(file: Path, name: str, tensors: Any) -> np.ndarray:
    try:
        return tensors.get_tensor(name)
    except (SafetensorError, TypeError, AttributeError, KeyError) as error:  # dtypes that numpy lacks
        kind = tensors.get_slice(name).get_dtype()
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {kind}, which cannot be read.") from error


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Files to read, and which tensors of each (None: all)."""
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    if (folder / INDEX).exists():
        return dict(_shards(folder))
    pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if pickled:
        raise CheckpointError(f"{pickled[0]}: pickled weights are never loaded; convert the model to safetensors.")
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}.")


def _shards(folder: Path) -> dict[Path, list[str]]:
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(f"{folder / INDEX}: has no 'weight_map' from tensors to files.")
    files: dict[Path, list[str]] = {}
    for name, file in sorted(placed.items()):
        if Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: places tensor {name!r} outside the folder, in {file!r}.")
        files.setdefault(folder / file, []).append(name)
    for path, names in files.items():
        if not path.exists():
            raise CheckpointError(f"{path}: no such file, although {INDEX} places tensor {names[0]!r} there.")
    return files
