"""Programs compiled once for each function, static arguments and shapes, with the seconds that took."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

_programs: dict[Any, Any] = {}
_lists: list[list[Any]] = []


def compiled(function: Any, static: tuple[Any, ...], *args: Any) -> tuple[Callable, float]:
    """The compiled program of a jitted function whose first arguments are `static`, and the seconds it took.

    One compilation for each function, static arguments and shapes; 0 seconds if it is there already.
    """
    leaves, treedef = jax.tree.flatten(args)
    key = (function, static, treedef, tuple((x.shape, x.dtype) for x in leaves))
    start = time.perf_counter()
    fresh = key not in _programs
    if fresh:
        _programs[key] = function.lower(*static, *args).compile()
    for programs in _lists:
        programs.append(_programs[key])
    return _programs[key], time.perf_counter() - start if fresh else 0.0


@contextlib.contextmanager
def recorded() -> Iterator[list[Any]]:
    """A list that fills with the programs asked for inside the block, with repeats."""
    programs: list[Any] = []
    _lists.append(programs)
    try:
        yield programs
    finally:
        _lists.pop()


def count(function: Any) -> int:
    """Programs of a jitted function so far."""
    return sum(key[0] is function for key in _programs)


def timed(function: Any, static: Any, *args: Any) -> tuple[Any, float, float]:
    """Call a compiled program: its result, seconds of work, seconds of compilation."""
    program, compile_s = compiled(function, (static,), *args)
    start = time.perf_counter()
    out = jax.block_until_ready(program(*args))
    return out, time.perf_counter() - start, compile_s
