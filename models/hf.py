"""Hugging Face folders: config.json and safetensors, single or sharded. Nothing is executed, nothing unpickled."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from models.assemble import assemble
from models.config import ModelConfig
from models.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_config(folder: Path) -> ModelConfig:
    """Read config.json; end-of-text ids of generation_config.json are added.

    Raises:
      CheckpointError: If it is absent, no JSON, or not supported.
    """
    values = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists() and values.get("eos_token_id") is not None:
        more = read_json(generation).get("eos_token_id")
        values = {**values, "eos_token_id": sorted({*_listed(values["eos_token_id"]), *_listed(more)})}
    try:
        return ModelConfig.from_hf(values)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def load_params(folder: Path, config: ModelConfig, dtype: Any) -> Any:
    """Read the parameters of a folder, one tensor at a time."""
    return assemble(config, _tensors(folder), dtype)


def read_json(file: Path) -> Any:
    """Parse a JSON file, or raise CheckpointError that names it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def _tensors(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    files = _files(folder)
    for file, names in files.items():
        try:
            with safe_open(file, framework="flax") as tensors:
                held = set(tensors.keys())
                for name in sorted(held) if names is None else names:
                    if name not in held:
                        raise CheckpointError(f"{file}: no tensor {name!r}, which {INDEX} places here.")
                    yield str(file), name, np.asarray(tensors.get_tensor(name))
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Files to read, and which tensors of each (None: all)."""
    if (folder / INDEX).exists():
        placed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict):
            raise CheckpointError(f"{folder / INDEX}: has no 'weight_map'.")
        files: dict[Path, list[str] | None] = {}
        for name, file in sorted(placed.items()):
            files.setdefault(folder / file, []).append(name)  # type: ignore[union-attr]
        for file in files:
            if not file.exists():
                raise CheckpointError(f"{file}: no such file, although {INDEX} names it.")
        return files
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if pickled:
        raise CheckpointError(
            f"{pickled[0]}: pickled weights are never loaded; save the model with safe_serialization=True."
        )
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}.")
