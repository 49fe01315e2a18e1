"""Flax transformers that carry a compressed cache; checkpoints in and out; generation."""

from models.config import ConfigError, ModelConfig
from models.errors import CheckpointError
from models.integer_weights import to_integers
from models.integers import IntegerFormat
from models.language_model import LanguageModel, load, load_config, load_layout
from models.rotation import rotate
from models.tokenizer import Tokenizer
from models.transformer import Transformer

__all__ = [
    "CheckpointError",
    "ConfigError",
    "IntegerFormat",
    "LanguageModel",
    "ModelConfig",
    "Tokenizer",
    "Transformer",
    "load",
    "load_config",
    "load_layout",
    "rotate",
    "to_integers",
]
