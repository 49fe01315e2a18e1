"""The tiny checkpoints in `tests/golden/models` and what another implementation computed with them."""

import functools
from pathlib import Path

import jax
import numpy as np

import models

FOLDER = Path(__file__).parents[1] / "golden" / "models"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/golden.npz"))
PROMPT = 24  # tokens before the greedy ones
ATOL = 2e-4  # float32, logits of spread 1.6 to 7; the largest seen is 9e-5


@functools.cache
def load(name: str) -> tuple[models.LanguageModel, dict[str, np.ndarray]]:
    """Load a checkpoint and its golden arrays."""
    with np.load(FOLDER / name / "golden.npz") as arrays:
        return models.load(FOLDER / name, dtype="float32"), dict(arrays)


@functools.cache
def forward(name: str):
    """The jitted forward pass of a checkpoint's model: (tokens, caches, length, logits=, rope_len=)."""
    lm, _ = load(name)
    return functools.partial(jax.jit(lm.model.apply, static_argnames="logits"), lm.params)
