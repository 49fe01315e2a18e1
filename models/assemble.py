"""From a stream of named tensors to a checked parameter tree."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.errors import CheckpointError
from models.names import flatten, ignored, pieces, place, unflatten
from models.transformer import param_shapes


def assemble(config: ModelConfig, tensors: Iterable[tuple[str, str, np.ndarray]], dtype: Any) -> Any:
    """Place (file, name, tensor) triples one at a time; at most one tensor is held beside what is placed.

    Raises:
      CheckpointError: Naming file and tensor, if one is unexpected, twice there, of a wrong shape, or missing.
    """
    expected = flatten(param_shapes(config)["params"])
    placed: dict[str, jax.Array] = {}
    tied, file = None, "the checkpoint"
    for file, name, tensor in tensors:
        if ignored(name):
            continue
        path = place(config, name)
        if path is None:
            raise CheckpointError(f"{file}: unexpected tensor {name!r} for a {config.family} model.")
        for ours, part in pieces(config, path, tensor):
            if ours == "lm_head.weight" and config.tie_embeddings:
                tied = (name, part)
                continue
            if ours not in expected:
                raise CheckpointError(f"{file}: tensor {name!r} has no place in this {config.family} configuration.")
            if ours in placed:
                raise CheckpointError(f"{file}: tensor {name!r} is there twice.")
            if part.shape != expected[ours].shape:
                raise CheckpointError(
                    f"{file}: tensor {name!r} gives {ours} the shape {part.shape}, expected {expected[ours].shape}."
                )
            placed[ours] = jnp.asarray(np.ascontiguousarray(part), dtype)
    missing = sorted(set(expected) - set(placed))
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"{file}: no tensor for {', '.join(missing[:5])}{more}.")
    if tied is not None:
        _check_tied(file, *tied, placed["embed_tokens.weight"])
    return {"params": unflatten({path: placed[path] for path in expected})}


def _check_tied(file: str, name: str, head: np.ndarray, table: jax.Array) -> None:
    """A stored head of a model whose config ties it must be the embedding."""
    if head.shape != table.shape or not np.array_equal(jnp.asarray(np.asarray(head), table.dtype), table):
        raise CheckpointError(
            f"{file}: tensor {name!r} differs from the embedding although config.json has tie_word_embeddings=true."
        )
