"""Sequences in and out of batch slots: one generic tree operation each, for every method."""

import dataclasses
from typing import Any

import jax

from kvcomp_jax.cache import LayerCache


def insert_row(caches: Any, row: jax.Array | int, one: Any) -> Any:
    """Put the single row of `one` into slot `row` of `caches`; any pytrees of caches of the same plan.

    Raises:
      ValueError: If the two differ in structure or shapes, or `one` has not exactly one row.
    """
    many_def, one_def = jax.tree.structure(caches), jax.tree.structure(one)
    if many_def != one_def:  # type: ignore[operator]
        raise ValueError("insert_row needs caches of the same plan: their structures differ.")

    def put(many: jax.Array, single: jax.Array) -> jax.Array:
        if single.shape != (1, *many.shape[1:]):
            raise ValueError(f"insert_row needs arrays of one row {(1, *many.shape[1:])}, got {single.shape}.")
        return jax.lax.dynamic_update_slice_in_dim(many, single.astype(many.dtype), row, 0)

    return jax.tree.map(put, caches, one)


def free_row(caches: Any, row: jax.Array | int) -> Any:
    """Empty slot `row` of `caches`; its limits stay."""

    def free(cache: LayerCache) -> LayerCache:
        def zero(x: jax.Array, value: int = 0) -> jax.Array:
            return x.at[row].set(value)

        tiers = tuple(
            dataclasses.replace(
                tier,
                entered=zero(tier.entered),
                pos=None if tier.pos is None else zero(tier.pos, -1),
                stat=jax.tree.map(zero, tier.stat),
                lookup=tier.lookup and tier.lookup.freed(row),
            )
            for tier in cache.tiers
        )
        return dataclasses.replace(cache, tiers=tiers, length=zero(cache.length), settled=zero(cache.settled))

    return jax.tree.map(free, caches, is_leaf=lambda x: isinstance(x, LayerCache))
