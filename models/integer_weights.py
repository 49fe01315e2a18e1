"""A model's linear maps brought to integers: rounded to the nearest code, or by GPTQ on the inputs of a text."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from models.gptq import gptq_codes, nearest_codes, search_scale
from models.integers import IntegerFormat, pack_weight, packed_shape
from models.language_model import LanguageModel, check_ids
from models.layers import Linear
from models.transformer import Block, Transformer

# Maps of a layer in the order they are rounded in; those of one entry get the same input.
ORDER = (
    ("attn", ("q_proj", "k_proj", "v_proj")),
    ("attn", ("o_proj",)),
    ("mlp", ("up_proj", "gate_proj")),
    ("mlp", ("down_proj",)),
)


def to_integers(
    lm: LanguageModel,
    integers: IntegerFormat,
    *,
    calibration: Any = None,
    advance: Callable[[], None] = lambda: None,
) -> LanguageModel:
    """Return the model with its linear maps in `integers`; embeddings, norms, biases and the head stay in floats.

    Args:
      lm: A model in floats, best a rotated one (`models.rotation`).
      integers: Bits of weights and activations.
      calibration: Token sequences i32[N, T] for GPTQ; None rounds to the nearest. Each map is rounded for what the
        rounded maps before it make of these texts, with activations in floats.
      advance: Called after each layer.

    Raises:
      ValueError: If the weights are packed already or cannot be packed, or `calibration` is not [N, T].
    Source: QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4; there 128 sequences of 2048 tokens.
    """
    bits = integers.weight_bits
    if lm.config.integers.weight_bits is not None:
        raise ValueError(f"the weights are packed at {lm.config.integers.weight_bits} bits already.")
    config = dataclasses.replace(lm.config, integers=integers)
    if bits is None:
        return LanguageModel(config, lm.params, lm.tokenizer)
    texts = None if calibration is None else _Texts(lm, calibration)
    params = dict(lm.params["params"])
    for i in range(config.num_layers):
        params[f"layers_{i}"] = _layer(i, params[f"layers_{i}"], bits, texts)
        advance()
    return LanguageModel(config, {"params": params}, lm.tokenizer)


def _layer(index: int, floats: Any, bits: int, texts: "_Texts | None") -> Any:
    """A layer's parameters with packed maps."""
    packed = floats
    for part, names in ORDER:
        gram = None if texts is None else texts.gram(index, floats, names[0])
        for name in names:
            if name not in floats[part]:  # an MLP without gate
                continue
            weight = floats[part][name]["weight"]
            packed_shape(weight.shape[1], weight.shape[0], bits)
            scale = search_scale(weight, bits)
            if gram is None:
                codes = nearest_codes(weight, scale, bits)
            else:
                codes = jnp.asarray(gptq_codes(np.asarray(weight), gram, np.asarray(scale), bits))
            rounded = (codes * scale.astype(jnp.float32)[:, None]).astype(weight.dtype)
            floats = _replace(floats, part, name, {"weight": rounded})
            packed = _replace(packed, part, name, {"codes": pack_weight(codes, bits), "scale": scale})
    if texts is not None:
        texts.step(index, floats)
    return packed


def _replace(layer: Any, part: str, name: str, weight: dict[str, jax.Array]) -> Any:
    """A layer's parameters with another weight of one map; its bias stays."""
    kept = {key: value for key, value in layer[part][name].items() if key == "bias"}
    return {**layer, part: {**layer[part], name: {**weight, **kept}}}


class _Texts:
    """Hidden states of calibration texts on their way through the layers, one sequence a pass."""

    def __init__(self, lm: LanguageModel, tokens: Any) -> None:
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(f"calibration must be a non-empty [N, T], got shape {tokens.shape}.")
        check_ids(tokens, lm.config.vocab_size)
        self._config = lm.config
        started = [_start(lm.model, lm.params, row[None]) for row in tokens]
        self._hidden = [hidden for hidden, _ in started]
        self._angles = started[0][1]  # of each layer; the same for texts of one length

    def gram(self, index: int, params: Any, name: str) -> np.ndarray:
        """Sum of x x^T over the inputs of a map, f64[M, M]."""
        block, angles = self._block(index), self._angles[index]
        total = np.zeros(())
        for x in self._hidden:
            total = total + np.asarray(_gram(block, name, params, x, angles), np.float64)
        return total

    def step(self, index: int, params: Any) -> None:
        """Pass a layer."""
        block, angles = self._block(index), self._angles[index]
        self._hidden = [_pass(block, params, x, angles) for x in self._hidden]

    def _block(self, index: int) -> Block:
        """The first layer that is built like this one, so that equal layers are compiled once."""
        windows = self._config.sliding_windows
        return Block(self._config, windows.index(windows[index]))


@partial(jax.jit, static_argnums=0)
def _start(model: Transformer, params: Any, tokens: jax.Array) -> tuple[jax.Array, list[Any]]:
    """What the first layer gets, and the angles that each gets."""
    calls = []

    def watch(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Block) and context.method_name == "__call__":
            calls.append(args[:2])
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        model.apply(params, tokens, logits="none")
    return calls[0][0], [angles for _, angles in calls]


@partial(jax.jit, static_argnums=(0, 1))
def _gram(block: Block, name: str, params: Any, x: jax.Array, angles: Any) -> jax.Array:
    """X^T X of the inputs of a map of a layer."""
    seen = []

    def watch(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Linear) and (context.module.name, context.method_name) == (name, "__call__"):
            rows = args[0].astype(jnp.float32).reshape(-1, args[0].shape[-1])
            seen.append(jnp.matmul(rows.T, rows, precision="highest"))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        block.apply({"params": params}, x, angles, None, None)
    return seen[0]


@partial(jax.jit, static_argnums=0)
def _pass(block: Block, params: Any, x: jax.Array, angles: Any) -> jax.Array:
    return block.apply({"params": params}, x, angles, None, None)[0]
