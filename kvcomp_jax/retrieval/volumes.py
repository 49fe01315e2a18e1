"""Boxes and balls that stand for the keys of pages."""

from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.types import pytree

RADII = ("max", "mean", "center")


@pytree
class Boxes:
    """An axis-aligned box a page: 2 D numbers."""

    upper: jax.Array  # [B, K, N, D], dtype of the keys
    lower: jax.Array  # [B, K, N, D]

    @classmethod
    def around(cls, rows: jax.Array, radius: str) -> Self:
        """Boxes of keys [B, K, N, P, D], with a half width a channel."""
        if radius == "max":
            return cls(upper=rows.max(3), lower=rows.min(3))
        center = _middle(rows)
        half = _extent(jnp.abs(center[:, :, :, None] - rows.astype(jnp.float32)), radius)
        return cls(upper=(center + half).astype(rows.dtype), lower=(center - half).astype(rows.dtype))

    def best(self, q: jax.Array) -> jax.Array:
        """The largest product of queries f32[B, K, G, D] with a point of each box, f32[B, K, G, N]."""
        positive, negative = jax.nn.relu(q), jax.nn.relu(-q)
        best = jnp.einsum("bkgd,bknd->bkgn", positive, self.upper, preferred_element_type=jnp.float32)
        return best - jnp.einsum("bkgd,bknd->bkgn", negative, self.lower, preferred_element_type=jnp.float32)


@pytree
class Balls:
    """A ball a page: D + 1 numbers."""

    center: jax.Array  # [B, K, N, D], dtype of the keys
    radius: jax.Array  # [B, K, N], dtype of the keys

    @classmethod
    def around(cls, rows: jax.Array, radius: str) -> Self:
        """Balls of keys [B, K, N, P, D], their radius from L2 distances to the center as it is stored."""
        kept = jnp.finfo(rows.dtype)
        # Not a cast there and back, of which XLA may make nothing.
        center = lax.reduce_precision(_middle(rows), kept.nexp, kept.nmant)
        apart = jnp.linalg.norm(center[:, :, :, None] - rows.astype(jnp.float32), axis=-1)  # [B, K, N, P]
        return cls(center=center.astype(rows.dtype), radius=_rounded_up(_extent(apart, radius), rows.dtype))

    def best(self, q: jax.Array) -> jax.Array:
        """The largest product of queries f32[B, K, G, D] with a point of each ball, f32[B, K, G, N]."""
        to_center = jnp.einsum("bkgd,bknd->bkgn", q, self.center, preferred_element_type=jnp.float32)
        return to_center + jnp.linalg.norm(q, axis=-1, keepdims=True) * self.radius[:, :, None].astype(jnp.float32)


VOLUMES: dict[str, type[Boxes] | type[Balls]] = {"box": Boxes, "ball": Balls}


def _middle(rows: jax.Array) -> jax.Array:
    """Between the minimum and maximum of each channel of keys [B, K, N, P, D], f32[B, K, N, D]."""
    return (rows.min(3).astype(jnp.float32) + rows.max(3).astype(jnp.float32)) / 2


def _extent(apart: jax.Array, radius: str) -> jax.Array:
    """Of distances [B, K, N, P, ...] of a page's keys the largest, the mean, or the middle of smallest and largest."""
    if radius == "mean":
        return apart.mean(3)
    return apart.max(3) if radius == "max" else (apart.min(3) + apart.max(3)) / 2


def _rounded_up(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cast to a dtype of fewer bits, to no less than x."""
    return x if dtype == x.dtype else jnp.nextafter(x.astype(dtype), jnp.inf)
