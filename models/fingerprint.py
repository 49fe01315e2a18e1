"""Which model this is: a digest of its configuration and of a few of its weights."""

import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np

from models.config import ModelConfig
from models.names import flatten

_VALUES = 64  # of a tensor


def fingerprint(config: ModelConfig, params: Any) -> str:
    """Return a hexadecimal digest that tells checkpoints of one architecture apart.

    Weights count as bfloat16, so that a checkpoint has the same fingerprint in whatever dtype it is loaded. Reads the
    beginnings of the embedding, the last norm, and the first and last layer's attention.
    """
    flat = flatten(params["params"])
    layers = {f"layers_{i}.attn." for i in (0, config.num_layers - 1)}
    chosen = [p for p in sorted(flat) if not p.startswith("layers_") or any(p.startswith(layer) for layer in layers)]
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for path in chosen:
        begin = np.asarray(flat[path][:1]).reshape(-1)[:_VALUES]
        digest.update(path.encode() + begin.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()
