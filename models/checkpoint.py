"""Our own checkpoints: parameters through Orbax, configuration and tokenizer as JSON beside them."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from models.config import ModelConfig
from models.errors import CheckpointError
from models.hf import read_json
from models.names import flatten
from models.tokenizer import Tokenizer
from models.transformer import param_shapes

_CONFIG, _TOKENIZER, _PARAMS, _FORMAT = "kvcomp_jax.json", "kvcomp_jax_tokenizer.json", "params", 1


def is_checkpoint(folder: Path) -> bool:
    """Whether `save` wrote this folder."""
    return (folder / _CONFIG).exists()


def save(folder: Path, config: ModelConfig, params: Any, tokenizer: Tokenizer | None) -> None:
    """Write a checkpoint into a folder that does not exist yet or is empty.

    Raises:
      CheckpointError: If the folder holds something, or is a file.
    """
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is there already; choose another folder.")
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
    try:
        return ModelConfig.from_dict(values["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG}: not a configuration that `save` wrote: {error}") from error


def load(folder: Path, dtype: Any) -> tuple[ModelConfig, Any, Tokenizer | None]:
    """Read what `save` wrote, with parameters in `dtype` on the default device.

    Raises:
      CheckpointError: Naming the file that is damaged, absent, or does not fit the configuration.
    """
    config = load_config(folder)
    return config, _restore(folder / _PARAMS, config, dtype), _tokenizer(folder / _TOKENIZER)


def _restore(folder: Path, config: ModelConfig, dtype: Any) -> Any:
    expected = param_shapes(config)
    device = jax.sharding.SingleDeviceSharding(jnp.zeros(()).devices().pop())

    def leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:  # codes and their scales keep their own dtypes
        return jax.ShapeDtypeStruct(x.shape, dtype if x.dtype == jnp.float32 else x.dtype, sharding=device)

    wanted = jax.tree.map(leaf, expected)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; the checkpoint is not whole.")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            _check_shapes(folder, checkpointer.metadata(folder.resolve()), expected)
            return checkpointer.restore(folder.resolve(), wanted)
    except CheckpointError:
        raise
    except (ValueError, OSError, KeyError, TypeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder}: cannot be restored: {why}") from error


def _check_shapes(folder: Path, metadata: Any, expected: Any) -> None:
    """Compare what is stored with what the configuration says, before anything is read."""
    stored = {path: tuple(leaf.shape) for path, leaf in flatten(metadata.item_metadata.tree).items()}
    for path, leaf in flatten(expected).items():
        if stored.get(path) != leaf.shape:
            here = "is absent" if path not in stored else f"has shape {stored[path]}"
            raise CheckpointError(f"{folder}: {path} {here}, expected {leaf.shape}.")


def _tokenizer(file: Path) -> Tokenizer | None:
    if not file.exists():
        return None
    try:
        return Tokenizer.from_json(file.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
