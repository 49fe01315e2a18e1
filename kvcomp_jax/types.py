"""The two kinds of object: what compiles (static fields) and what changes (array fields)."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only dataclass whose non-static fields are pytree leaves."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


def static(**kwargs: Any) -> Any:
    """Declare a field that belongs to the treedef: hashable, never an array."""
    return dataclasses.field(metadata={"static": True}, **kwargs)
