"""From a stream of named tensors to a checked parameter tree."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.errors import CheckpointError
from models.names import Names, flatten, pieces, unflatten
from models.transformer import param_shapes

_HEAD, _TABLE = "lm_head.weight", "embed_tokens.weight"


def assemble(
    config: ModelConfig, names: Names, tensors: Iterable[tuple[Path, str, np.ndarray]], dtype: Any, source: Path
) -> Any:
    """Build the parameter tree, placing (file, name, tensor) triples one at a time.

    Args:
      config: What to expect.
      names: How the checkpoint names its tensors.
      tensors: Read when asked for, so that one tensor at most is held beside what is placed.
      dtype: Of the parameters.
      source: The checkpoint, for messages about tensors that are in none of its files.

    Raises:
      CheckpointError: Naming file and tensor, if one is unexpected, twice there, not of floats, of a wrong shape, or
        missing.
    """
    expected = flatten(param_shapes(config)["params"])
    placed: dict[str, jax.Array] = {}
    tied: tuple[str, np.ndarray] | None = None
    for file, name, tensor in tensors:
        where = f"{file}: tensor {name!r}"
        for path, part in _parts(config, names, where, name, tensor):
            if path == _HEAD and config.tie_embeddings:
                tied = (where, part)
                continue
            _check(config, where, path, part, expected.get(path))
            if path in placed:
                raise CheckpointError(f"{where} is there twice.")
            placed[path] = jnp.asarray(np.ascontiguousarray(part, dtype=dtype))
    _check_complete(source, names, [path for path in expected if path not in placed])
    if tied is not None:
        _check_tied(*tied, placed[_TABLE])
    return {"params": unflatten({path: placed[path] for path in expected})}


def _parts(
    config: ModelConfig, names: Names, where: str, name: str, tensor: np.ndarray
) -> Iterable[tuple[str, np.ndarray]]:
    """Our parameters in a tensor; none if it is no parameter."""
    if names.ignores(name):
        return []
    path = names.place(name)
    if path is None:
        raise CheckpointError(f"{where} is unexpected: a {config.family} model has no such parameter.")
    if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
        raise CheckpointError(f"{where} has dtype {tensor.dtype}; float32, float16 and bfloat16 are supported.")
    try:
        return list(pieces(config, path, tensor))
    except CheckpointError as error:
        raise CheckpointError(f"{where} {error}.") from error


def _check(config: ModelConfig, where: str, path: str, part: np.ndarray, expected: Any) -> None:
    if expected is None:
        raise CheckpointError(f"{where} is unexpected: this {config.family} configuration has no {path}.")
    if part.shape != expected.shape:
        raise CheckpointError(f"{where} gives {path} the shape {part.shape}, expected {expected.shape}.")


def _check_complete(source: Path, names: Names, missing: list[str]) -> None:
    absent = sorted({names.source(path) for path in missing})
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise CheckpointError(f"{source}: has no tensor {', '.join(map(repr, absent[:5]))}{more}.")


def _check_tied(where: str, head: np.ndarray, table: jax.Array) -> None:
    """A stored head of a model whose configuration ties it must be the embedding."""
    if head.shape != table.shape or not np.array_equal(head.astype(table.dtype), np.asarray(table)):
        raise CheckpointError(f"{where} differs from the embedding, although the configuration has it tied.")
