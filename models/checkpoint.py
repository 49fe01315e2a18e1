"""Our own checkpoints: parameters through Orbax, configuration and tokenizer as JSON beside them."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from models.config import ModelConfig
from models.errors import CheckpointError
from models.hf import read_json
from models.tokenizer import Tokenizer
from models.transformer import param_shapes

_CONFIG, _TOKENIZER, _PARAMS, _FORMAT = "kvcomp_jax.json", "kvcomp_jax_tokenizer.json", "params", 1


def is_checkpoint(folder: Path) -> bool:
    """Whether `save` wrote this folder."""
    return (folder / _CONFIG).exists()


def save(folder: Path, config: ModelConfig, params: Any, tokenizer: Tokenizer | None) -> None:
    """Write a checkpoint into a folder that does not exist yet or is empty.

    Raises:
      CheckpointError: If the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is not empty; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / _PARAMS).resolve(), params)
    if tokenizer is not None:
        (folder / _TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    values = {"format": _FORMAT, "config": config.to_dict()}
    (folder / _CONFIG).write_text(json.dumps(values, indent=1), encoding="utf-8")  # last: marks it complete


def load_config(folder: Path) -> ModelConfig:
    """Read only the configuration."""
    values = read_json(folder / _CONFIG)
    if values.get("format") != _FORMAT:
        raise CheckpointError(f"{folder / _CONFIG}: format {values.get('format')!r}, this version reads {_FORMAT}.")
    return ModelConfig.from_dict(values["config"])


def load(folder: Path, dtype: Any) -> tuple[ModelConfig, Any, Tokenizer | None]:
    """Read what `save` wrote, with parameters in `dtype`."""
    config = load_config(folder)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=device), param_shapes(config))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore((folder / _PARAMS).resolve(), wanted)
    except (ValueError, FileNotFoundError, KeyError) as error:
        raise CheckpointError(f"{folder / _PARAMS}: cannot be restored: {str(error).splitlines()[0]}") from error
    file = folder / _TOKENIZER
    return config, params, Tokenizer.from_json(file.read_text(encoding="utf-8")) if file.exists() else None
