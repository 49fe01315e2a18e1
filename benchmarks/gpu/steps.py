"""Whole decode steps of a model in the shape of Llama-3-8B with random weights."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.aot.programs import LLAMA3_8B, cut
from benchmarks.record import Record
from benchmarks.steps import measure_steps
from models import LanguageModel, ModelConfig
from models.transformer import param_shapes

METHODS = ("full", "int8", "int4", "kivi:bits=4", "kivi:bits=2")
SECONDS = 90.0  # that must be left for it to begin: most of it compiles, which nothing interrupts


def measure(record: Record, layers: int, rounds: int, workers: int, *, tiny: bool) -> None:
    """Time steps of 8 rows with 32k tokens each in the cache; `tiny` is the same code at a shape for a CPU."""
    if not layers:
        return
    if record.left() < SECONDS:
        record.add("cut", decode_steps="not reached")
        return
    config, batch, context, dtype = cut(LLAMA3_8B, layers), 8, 32768, jnp.bfloat16
    name = "Llama-3-8B" if layers >= LLAMA3_8B.num_layers else f"Llama-3-8B, {layers} of its layers"
    if tiny:
        config = dataclasses.replace(cut(LLAMA3_8B, min(layers, 2)), model_dim=128, num_heads=4, num_kv_heads=2,
                                     ffn_dim=256, vocab_size=512)  # fmt: skip
        batch, context, dtype, name = 2, 512, jnp.float32, "a tiny Llama"
    lm = LanguageModel(config, jax.block_until_ready(_random_params(config, dtype)))
    measure_steps(
        record, lm, METHODS, model=f"{name}, random weights", batch=batch, context=context, rounds=rounds,
        workers=workers,
    )  # fmt: skip


def _random_params(config: ModelConfig, dtype: jax.typing.DTypeLike) -> object:
    """Normal weights small enough for everything to stay finite, drawn on the device."""
    draws: dict[tuple[int, ...], Callable] = {}

    def draw(number: int, shape: tuple[int, ...]) -> jax.Array:
        if shape not in draws:
            draws[shape] = jax.jit(lambda key: 0.02 * jax.random.normal(key, shape, dtype))
        return draws[shape](jax.random.key(number))

    leaves, tree = jax.tree.flatten(param_shapes(config))
    return jax.tree.unflatten(tree, [draw(i, leaf.shape) for i, leaf in enumerate(leaves)])
