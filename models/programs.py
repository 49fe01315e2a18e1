"""Programs compiled once for each function, static arguments and shapes, with the seconds that took."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

_programs: dict[Any, Any] = {}
_lists: list[list["Asked"]] = []


class Asked(NamedTuple):
    """A program that was asked for, and what stood in memory then."""

    program: Any
    live_bytes: int  # of all arrays of the process, its arguments among them

    @property
    def peak_bytes(self) -> int:
        """Bytes held while it runs: all arrays, its results and temporaries; what it takes over counts once."""
        held = self.program.memory_analysis()
        fresh = held.output_size_in_bytes - held.alias_size_in_bytes
        return self.live_bytes + fresh + held.temp_size_in_bytes


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
    if _lists:
        asked = Asked(_programs[key], sum(x.nbytes for x in jax.live_arrays()))
        for programs in _lists:
            programs.append(asked)
    return _programs[key], time.perf_counter() - start if fresh else 0.0


@contextlib.contextmanager
def recorded() -> Iterator[list[Asked]]:
    """A list that fills with the programs asked for inside the block, with repeats."""
    programs: list[Asked] = []
    _lists.append(programs)
    try:
        yield programs
    finally:
        _lists.pop()


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Forget at its end the programs that the block compiled first: a model's take hundreds of megabytes.

    For loops over methods, none of whose programs suit the next one. What was compiled before stays.
    """
    before = set(_programs)
    try:
        yield
    finally:
        for key in set(_programs) - before:
            del _programs[key]
        jax.clear_caches()  # JAX keeps them, too


def count(function: Any) -> int:
    """Programs of a jitted function so far."""
    return sum(key[0] is function for key in _programs)


def timed(function: Any, static: Any, *args: Any) -> tuple[Any, float, float]:
    """Call a compiled program: its result, seconds of work, seconds of compilation."""
    program, compile_s = compiled(function, (static,), *args)
    start = time.perf_counter()
    out = jax.block_until_ready(program(*args))
    return out, time.perf_counter() - start, compile_s
