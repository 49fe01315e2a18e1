"""Which backend of an operation runs: by platform at trace time, or by name.

An operation is a folder of modules, one a backend, each with the same functions:

- `reference`: plain JAX, the definition; may store what it decodes.
- `blocked`: plain JAX that XLA compiles well: a block is decoded, used and forgotten. CPU, and whoever has no kernel.
- `cpu`: compiled by Numba, a custom call on XLA's threads.
- `tpu`: Pallas, Mosaic TPU. `hopper`: Pallas, Mosaic GPU, H100 and newer. `gpu`: Triton through jax-triton, Ampere and
  newer.

A backend that cannot take a call raises `Unsupported` with the reason while it is traced. The environment variable
`KVCOMP_WITHOUT`, a comma-separated list, names backends that are passed over unless a call names them.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

BACKENDS = ("reference", "blocked", "cpu", "tpu", "hopper", "gpu")
_ORDER = {"cpu": ("cpu", "blocked", "reference"), "tpu": ("tpu", "blocked", "reference"),
          "gpu": ("hopper", "gpu", "blocked", "reference")}  # fmt: skip
_INTERPRETED = ("tpu", "hopper", "gpu")
_NEEDS = {"cpu": "numba", "gpu": "jax_triton"}  # an extra of this package each


class Unsupported(NotImplementedError):
    """A backend's word that it cannot take a call, and why."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is compiled for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      capability: CUDA compute capability times ten, e.g. 90; 0 where there is none.
    """

    platform: str
    capability: int = 0


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which backend a call got, and why none of the better ones."""

    operation: str
    backend: str
    reasons: tuple[tuple[str, str], ...]  # (backend, why not), best first


_target = jax.make_user_context(default_value=None)
_passed_over = jax.make_user_context(default_value=())
_log: list[list[Choice]] = []


def compile_for(target: Target) -> contextlib.AbstractContextManager:
    """Choose backends for `target` while tracing, instead of for this process's own device (ahead-of-time use)."""
    return _target(target)


def without(*backends: str) -> contextlib.AbstractContextManager:
    """Pass over backends while tracing, e.g. all but the reference where something is to be differentiated."""
    return _passed_over(_checked(backends, "without"))


def target() -> Target:
    """What is being compiled for."""
    if _target.value is not None:
        return _target.value
    platform = jax.default_backend()
    if platform != "gpu":
        return Target(platform)
    return Target(platform, round(float(jax.devices()[0].compute_capability) * 10))


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collect the choices made while tracing inside the context; what jit has cached makes none."""
    log: list[Choice] = []
    _log.append(log)
    try:
        yield log
    finally:
        _log.remove(log)


def call(
    operation: str, implementation: str | None, *args: Any, function: str = "", interpret: bool = False, **options: Any
) -> Any:
    """Run `function` (by default named like the operation) of a backend.

    Args:
      operation: Folder under `pallas_kernels`.
      implementation: A backend's name: that one or an error. None: the platform's best that takes the call.
      args, options: Passed on.
      function: Which function of the backend's module.
      interpret: Run a kernel in its interpreter; plain JAX backends ignore it.

    Raises:
      ValueError: If there is no backend of that name, here or in KVCOMP_WITHOUT. Unsupported: If it was named and
        cannot take the call.
    """
    if implementation is not None and implementation not in BACKENDS:
        raise ValueError(f"implementation={implementation!r} must be None or one of {', '.join(BACKENDS)}.")
    function, reasons = function or operation, []
    without = _environment() if implementation is None else ()
    skipped = _passed_over.value if implementation is None else ()
    for backend in _ORDER[target().platform] if implementation is None else (implementation,):
        if backend in without:
            reasons.append((backend, "KVCOMP_WITHOUT names it."))
            continue
        if backend in skipped:
            reasons.append((backend, "the caller does without it."))
            continue
        more = {"interpret": interpret} if backend in _INTERPRETED else {}
        try:
            result = _traced_once(_load(operation, backend, function), args, {**options, **more})
        except Unsupported as reason:
            if implementation is not None:
                raise
            reasons.append((backend, str(reason)))
            continue
        for log in _log:
            log.append(Choice(operation, backend, tuple(reasons)))
        return result
    raise AssertionError(f"{operation} has no reference.")


def _traced_once(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call a backend so that calls that are alike, one a layer, are traced and lowered once in a program."""
    leaves, tree = jax.tree.flatten(args)
    arrays = [x if isinstance(x, jax.Array | np.ndarray) else None for x in leaves]
    static = tuple(None if isinstance(x, jax.Array | np.ndarray) else x for x in leaves)
    return _run(function, tree, static, tuple(sorted(options.items())), arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(function: Callable[..., Any], tree: Any, static: tuple, options: tuple, arrays: list) -> Any:
    leaves = [still if x is None else x for x, still in zip(arrays, static, strict=True)]
    return function(*jax.tree.unflatten(tree, leaves), **dict(options))


def _environment() -> tuple[str, ...]:
    return _checked(tuple(filter(None, os.environ.get("KVCOMP_WITHOUT", "").split(","))), "KVCOMP_WITHOUT")


def _checked(names: tuple[str, ...], who: str) -> tuple[str, ...]:
    for name in names:
        if name not in BACKENDS[1:]:
            raise ValueError(f"{who}={','.join(names)} names {name!r}; known: {', '.join(BACKENDS[1:])}.")
    return names


def _load(operation: str, backend: str, function: str) -> Callable[..., Any]:
    name = f"pallas_kernels.{operation}.{backend}"
    if importlib.util.find_spec(name) is None:
        raise Unsupported(f"{operation} has no {backend} backend.")
    if backend in _NEEDS:
        try:  # jax-triton cannot be imported either where it is installed beside a JAX without GPU support
            importlib.import_module(_NEEDS[backend])
        except ImportError as error:
            package = _NEEDS[backend].replace("_", "-")
            raise Unsupported(f"the {backend} backend needs {package}; pip install 'kvcomp_jax[{backend}]'.") from error
    found = getattr(importlib.import_module(name), function, None)
    if found is None:
        raise Unsupported(f"{operation} has no {function} on the {backend} backend.")
    return found
