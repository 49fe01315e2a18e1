"""Keys, values and queries of a model on a text, how much its loss minds the first two, and what values meet."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kvcomp_jax.calibrate import Activations
from models.language_model import LanguageModel
from models.layers import output_weight
from models.transformer import Transformer
from pallas_kernels import dispatch

Named = dict[str, jax.Array]


def activations(lm: LanguageModel, tokens: np.ndarray) -> list[Activations]:
    """Run a model forward and backward on one sequence.

    Gradients are those of the summed negative log-likelihood of each next token, with respect to keys before their
    rotation (after their norm, where there is one) and to values.

    Args:
      lm: The model.
      tokens: i32[T].

    Returns:
      For each layer, N = 1; on the host.
    """
    with dispatch.without(*dispatch.BACKENDS[1:]):  # only the reference can be differentiated
        seen, slopes = _seen_and_slopes(lm.model, lm.params, jnp.asarray(tokens, jnp.int32)[None])
    config = lm.config
    shape = (1, len(tokens), -1, config.head_dim)
    scale = config.head_dim**-0.5 if config.sm_scale is None else config.sm_scale

    def of(layer: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        path = _path(lm.model, layer, what)
        value, slope = (np.asarray(x[path], np.float32).reshape(shape) for x in (seen, slopes))
        return value, np.square(slope)

    layers = []
    for layer in range(config.num_layers):
        (k, k_weight), (v, v_weight) = of(layer, "k"), of(layer, "v")
        q = np.asarray(seen[_path(lm.model, layer, "q")], np.float32).reshape(shape) * np.float32(scale)
        projection = lm.params["params"][f"layers_{layer}"]["attn"]["o_proj"]
        o_weight = np.asarray(output_weight(projection, config), np.float32)
        layers.append(Activations(k, v, k_weight, v_weight, q, lm.layout.rope(layer, len(tokens)), o_weight))
    return layers


@functools.partial(jax.jit, static_argnums=0)
def _seen_and_slopes(model: Transformer, params: Any, tokens: jax.Array) -> tuple[Named, Named]:
    """Outputs of the modules that make keys, values and queries, by path, and the loss's gradients of the first two."""
    every = range(model.config.num_layers)
    queries = [_path(model, layer, "q") for layer in every]
    paths = queries + [_path(model, layer, what) for layer in every for what in "kv"]

    def loss(shift: Named) -> tuple[jax.Array, Named]:
        seen: Named = {}

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path, out = "/".join(context.module.path), call(*args, **kwargs)
            if path not in shift and path not in paths:
                return out
            seen[path] = out
            return out + shift[path] if path in shift else out

        with nn.intercept_methods(watch):
            logits = model.apply(params, tokens)[0]
        scores = jax.nn.log_softmax(logits[0, :-1], -1)
        return -jnp.take_along_axis(scores, tokens[0, 1:, None], -1).sum(), seen

    shapes = jax.eval_shape(lambda: loss({})[1])
    shift = {path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items() if path not in queries}
    slopes, seen = jax.grad(loss, has_aux=True)(shift)
    return seen, slopes


def _path(model: Transformer, layer: int, what: str) -> str:
    """The module whose output the keys or queries before rotation, or the values, are."""
    name = f"{what}_norm" if what in "qk" and model.config.qk_norm else f"{what}_proj"
    return f"layers_{layer}/attn/{name}"
