"""What is compiled: each operation's serving cases on each backend, and whole decode steps of two models.

Or, instead, the cases that interpreters run.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import kvcomp_jax as kvc
from benchmarks.aot.targets import Device
from models import ModelConfig, Transformer
from models.rope import RopeConfig
from models.transformer import param_shapes

OPERATIONS = (
    "quantized_decode",
    "quantize_pack",
    "homomorphic_decode",
    "hadamard",
    "gather_decode",
    "low_rank_decode",
    "entropy_decode",
    "codebook_decode",
    "prefill",
)
SMOLLM2 = ModelConfig(
    family="llama", num_layers=30, model_dim=576, num_heads=9, num_kv_heads=3, head_dim=64, ffn_dim=1536,
    vocab_size=49152, max_positions=8192, tie_embeddings=True, ropes=(RopeConfig(theta=1e5),) * 30,
    sliding_windows=(None,) * 30,
)  # fmt: skip
LLAMA3_8B = ModelConfig(
    family="llama", num_layers=32, model_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336,
    vocab_size=128256, max_positions=131072, ropes=(RopeConfig(theta=5e5, dim=128),) * 32,
    sliding_windows=(None,) * 32,
)  # fmt: skip
STEPS = {
    "SmolLM2-135M, 8 rows of 8k": (SMOLLM2, 8, 8192),
    "Llama-3-8B, 8 rows of 32k": (LLAMA3_8B, 8, 32768),
}
METHODS = ("full", "int8", "kivi:bits=4")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes it is compiled for.

    Attributes:
      group: Operation and backend, or "decode step": what one process compiles.
      name: Of the case.
      make: Returns the jitted function and its arguments as ShapeDtypeStructs.
      kernels: Whether it must contain a kernel of ours.
    """

    group: str
    name: str
    make: Callable[[], tuple[Any, tuple]]
    kernels: bool = True


def programs(device: Device, layers: int = 0, *, cases: bool = False) -> list[Program]:
    """All that is compiled for a device.

    Args:
      device: Whose backends are compiled.
      layers: Layers of the models whose decode steps are compiled; 0 = all.
      cases: Compile the cases that every backend is checked with, and neither serving shapes nor decode steps.
    """
    table = "CASES" if cases else "SERVING"
    found = [program for operation in OPERATIONS for program in _calls(operation, device, table)]
    return found if cases else found + _steps(layers)


def _calls(operation: str, device: Device, table: str) -> list[Program]:
    if importlib.util.find_spec(f"pallas_kernels.{operation}.cases") is None:
        return []
    cases = getattr(importlib.import_module(f"pallas_kernels.{operation}.cases"), table)
    return [
        Program(f"{operation} / {backend}", name, functools.partial(_call, operation, backend, case))
        for backend in device.backends
        if importlib.util.find_spec(f"pallas_kernels.{operation}.{backend}") is not None
        for name, case in cases.items()
    ]


def _steps(layers: int) -> list[Program]:
    return [
        Program(
            f"decode step / {name}",
            method,
            functools.partial(_step, cut(config, layers), method, batch, context),
            kernels=method != "full",
        )
        for name, (config, batch, context) in STEPS.items()
        for method in METHODS
    ]


def _call(operation: str, backend: str, case: Any) -> tuple[Any, tuple]:
    api = getattr(importlib.import_module(f"pallas_kernels.{operation}"), getattr(case, "function", operation))
    shapes, options = case.shapes(), getattr(case, "options", {})
    arrays = [isinstance(x, tuple) or hasattr(x, "shape") for x in shapes]  # what is not an array is an option

    def call(*given: Any) -> Any:
        left = iter(given)
        args = [next(left) if array else x for array, x in zip(arrays, shapes, strict=True)]
        return api(*args, **options, implementation=backend)

    return jax.jit(call), tuple(x for array, x in zip(arrays, shapes, strict=True) if array)


def cut(config: ModelConfig, layers: int) -> ModelConfig:
    """The first `layers` layers of a model; 0 = all."""
    num_layers = min(layers or config.num_layers, config.num_layers)
    windows = config.sliding_windows[:num_layers]
    return dataclasses.replace(config, num_layers=num_layers, ropes=config.ropes[:num_layers], sliding_windows=windows)


def _step(config: ModelConfig, method: str, batch: int, context: int) -> tuple[Any, tuple]:
    """One token a row through a model with a compressed cache, caches donated."""
    model = Transformer(config, dtype=jnp.bfloat16)
    plan = kvc.parse(method).plan(config.layout, max_len=context, prompt_len=context)
    caches = jax.eval_shape(lambda: plan.init(batch=batch, dtype=jnp.bfloat16))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), param_shapes(config))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)

    def step(params: Any, tokens: jax.Array, caches: Any) -> Any:
        return model.apply(params, tokens, caches, logits="last")

    return jax.jit(step, donate_argnums=2), (params, tokens, caches)
