"""Continuous batching: requests enter and leave the slots of one batch of caches while others decode.

The model is two functions. Everything on the device has one static shape, so a request that joins or leaves compiles
nothing; and each row settles at its own times, so what a request gets does not depend on who shares the batch.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvcomp_jax.cache import settle
from kvcomp_jax.rows import free_row, insert_row

Caches = Any  # tuple of `LayerCache`, one a layer
Read = Callable[[tuple[int, ...]], tuple[int, Caches]]
Step = Callable[[jax.Array, jax.Array, Caches], tuple[jax.Array, Caches]]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt's ids, how many tokens it gets at most, and the engine's step from which on it waits for a slot."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    arrival: int = 0

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1:
            raise ValueError(
                f"a request needs a prompt and max_new_tokens >= 1, got {len(self.prompt)} ids and "
                f"max_new_tokens={self.max_new_tokens}."
            )


class Engine:
    """Slots of one batch, the requests in them, and the queue before them.

    Attributes:
      caches: Of all slots, one a layer.
      steps: Decode steps so far.
      slots: The request's number in each slot, None where it is free.
      outputs: Ids that each request got so far.
    """

    def __init__(self, caches: Caches, read: Read, step: Step, *, eos_ids: Collection[int] = ()) -> None:
        """Take over empty `caches`.

        Args:
          caches: One a layer, a row a slot.
          read: From a prompt's ids to its first new token and its caches: of one row and the same plan.
          step: From tokens i32[B], live bool[B] and caches to the next tokens i32[B] and caches; rows that are not live
            stay as they are. It may take the caches over.
          eos_ids: A request ends before any of these.
        """
        self.caches, self.steps = caches, 0
        self._read, self._step, self._eos_ids = read, step, frozenset(eos_ids)
        num_slots = caches[0].length.shape[0]
        self.slots: list[int | None] = [None] * num_slots
        self.outputs: list[list[int]] = []
        self._requests: list[Request] = []
        self._queue: deque[int] = deque()
        self._tokens, self._ages = np.zeros(num_slots, np.int32), np.zeros(num_slots, np.int32)
        self._block_size = min((cache.spec.block_size for cache in caches if cache.spec.rungs), default=2**30)

    @property
    def num_finished(self) -> int:
        """Requests that have all their tokens."""
        return len(self._requests) - len(self._queue) - sum(number is not None for number in self.slots)

    def submit(self, request: Request) -> int:
        """Queue a request and return its number."""
        self._requests.append(request)
        self.outputs.append([])
        self._queue.append(len(self._requests) - 1)
        return self._queue[-1]

    def run(self, requests: Iterable[Request] = (), watch: Callable[["Engine"], None] | None = None) -> list[list[int]]:
        """Serve these and all that is queued; `watch` is called after every step. Return all outputs."""
        for request in requests:
            self.submit(request)
        while self._queue or any(number is not None for number in self.slots):
            self.advance()
            if watch is not None:
                watch(self)
        return self.outputs

    def advance(self) -> None:
        """Fill free slots from the queue, take one step in all live ones, and free those whose request ended."""
        self._admit()
        live = np.array([number is not None for number in self.slots])
        self.steps += 1
        if not live.any():
            return
        tokens, self.caches = self._step(jnp.asarray(self._tokens), jnp.asarray(live), self.caches)
        self._tokens = np.array(tokens)  # a copy: slots are overwritten as requests enter
        self._ages += live
        due = live & (self._ages % self._block_size == 0)
        if due.any():
            self.caches = _settle(self.caches, jnp.asarray(due))
        for slot, number in enumerate(self.slots):
            if number is not None and self._ends(number, int(self._tokens[slot])):
                self.caches = _free(self.caches, jnp.int32(slot))
                self.slots[slot] = None

    def _admit(self) -> None:
        """Read waiting prompts into free slots, first come first served."""
        for slot in range(len(self.slots)):
            while self.slots[slot] is None and self._queue and self._waits(self._queue[0]):
                number = self._queue.popleft()
                token, one = self._read(self._requests[number].prompt)
                if not self._ends(number, token):
                    self.caches = _insert(self.caches, jnp.int32(slot), one)
                    self.slots[slot], self._tokens[slot], self._ages[slot] = number, token, 0

    def _waits(self, number: int) -> bool:
        return self._requests[number].arrival <= self.steps

    def _ends(self, number: int, token: int) -> bool:
        """Keep a request's new token unless it is an end-of-text id; return whether that was its last."""
        if token in self._eos_ids:
            return True
        self.outputs[number].append(token)
        return len(self.outputs[number]) == self._requests[number].max_new_tokens


_insert = jax.jit(insert_row, donate_argnums=0)
_free = jax.jit(free_row, donate_argnums=0)


@functools.partial(jax.jit, donate_argnums=0)
def _settle(caches: Caches, rows: jax.Array) -> Caches:
    return tuple(settle(cache, rows) for cache in caches)
