"""Arrays that the cases of several operations draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import Format
from pallas_kernels.quantize_pack.reference import quantize_pack

encoded = jax.jit(quantize_pack, static_argnums=1)  # many cases share shapes, and one compilation


def draw_rows(rng: np.random.Generator, shape: tuple[int, ...], values: str) -> np.ndarray:
    """Rows f32[*b, S, D]: "normal", "constant" (all that share *b alike), or "outliers", one in a hundred huge."""
    x = rng.standard_normal(shape).astype(np.float32)
    if values == "constant":
        x[:] = x[..., :1, :1]
    elif values == "outliers":
        x *= np.where(rng.random(shape) < 0.01, 1e3, 1)
    return x


def draw_positions(
    rng: np.random.Generator, kind: str | None, shape: tuple[int, int, int], num_queries: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """Positions of slots [B, K, S] in no order and with holes, and of queries near the end.

    Args:
      kind: None (no positions), "shared" by the heads, or "per head".
    """
    pos, q_pos = position_shapes(kind, shape, num_queries)
    if pos is None or q_pos is None:
        return None, None
    places = rng.permuted(np.broadcast_to(np.arange(shape[-1]), pos.shape), axis=-1)
    drawn = np.where(rng.random(pos.shape) < 0.2, -1, places)
    return jnp.asarray(drawn, jnp.int32), jnp.full(q_pos.shape, shape[-1] - 3, jnp.int32)


def position_shapes(
    kind: str | None, shape: tuple[int, int, int], num_queries: int
) -> tuple[jax.ShapeDtypeStruct | None, jax.ShapeDtypeStruct | None]:
    """What `draw_positions` returns, as ShapeDtypeStructs."""
    if kind is None:
        return None, None
    batch, heads, slots = shape
    pos = jax.ShapeDtypeStruct((batch, heads if kind == "per head" else 1, slots), jnp.int32)
    return pos, jax.ShapeDtypeStruct((batch, num_queries), jnp.int32)


def rows_shape(shape: tuple[int, ...], dtype, fmt: Format | None):
    """Shapes of dense rows, or of their codes and metadata."""
    if fmt is None:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(functools.partial(quantize_pack, fmt=fmt), jax.ShapeDtypeStruct(shape, jnp.float32))
