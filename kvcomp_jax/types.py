"""The two kinds of object: what compiles (static fields) and what changes (array fields)."""

import dataclasses
import hashlib
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only dataclass whose non-static fields are pytree leaves."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


def static(**kwargs: Any) -> Any:
    """Declare a field that belongs to the treedef: hashable, never an array."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


class Constant:
    """A read-only array as a static value, e.g. a calibrated codebook: hashed and compared by what it holds."""

    def __init__(self, value: Any) -> None:
        self.value = np.array(value)
        self.value.setflags(write=False)
        self._key = (self.value.shape, self.value.dtype.str, hashlib.sha256(self.value.tobytes()).hexdigest())

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key == other._key

    def __repr__(self) -> str:
        shape, dtype, digest = self._key
        return f"Constant({dtype}{list(shape)}, {digest[:8]})"
