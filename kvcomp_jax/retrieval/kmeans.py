"""K-means of keys by cosine, with memory for a chunk of similarities at a time."""

import jax
import jax.numpy as jnp
from jax import lax

_CHUNK = 1024  # tokens whose similarities to all centroids exist at once


def kmeans(
    keys: jax.Array, live: jax.Array, centroid: jax.Array, active: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Move centroids to the means of the keys nearest to them, `iterations` times, and label once more.

    A key goes to the centroid of the largest cosine, the first among equals; a centroid becomes the mean of its keys
    as they are, not normalised; one without keys stays where it is.

    Args:
      keys: [B, K, S, D]. live: bool[B, S], which are tokens.
      centroid: [B, K, C, D], where they start. active: bool[B, C], which take part.
      iterations: Rounds.

    Returns:
      centroid f32[B, K, C, D]; label i32[B, K, S], C where not live; size i32[B, K, C], keys of each label.
    """
    num_clusters, num_tokens = centroid.shape[2], keys.shape[2]
    chunk = min(_CHUNK, num_tokens)
    rest = -num_tokens % chunk
    rows = jnp.pad(keys.astype(jnp.float32), ((0, 0), (0, 0), (0, rest), (0, 0)))
    rows = jnp.moveaxis(rows.reshape(*rows.shape[:2], -1, chunk, rows.shape[-1]), 2, 0)  # [n, B, K, P, D]
    alive = jnp.moveaxis(jnp.pad(live, ((0, 0), (0, rest))).reshape(live.shape[0], -1, chunk), 1, 0)
    centroid = centroid.astype(jnp.float32)

    def assign(state: tuple[jax.Array, ...], x: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        directions, total, size = state
        mine, alive = x
        cosine = jnp.einsum("bksd,bkcd->bksc", mine, directions)  # the keys' own norms change no order
        cosine = jnp.where(active[:, None, None], cosine, -jnp.inf)
        label = jnp.where(alive[:, None], jnp.argmax(cosine, -1).astype(jnp.int32), num_clusters)
        member = jax.nn.one_hot(label, num_clusters)
        total = total + jnp.einsum("bksc,bksd->bkcd", member, mine)
        return (directions, total, size + member.sum(2)), label

    def labelled(centroid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        norm = jnp.maximum(jnp.linalg.norm(centroid, axis=-1, keepdims=True), 1e-8)
        start = (centroid / norm, jnp.zeros_like(centroid), jnp.zeros(centroid.shape[:3]))
        (_, total, size), label = lax.scan(assign, start, (rows, alive))
        label = jnp.moveaxis(label, 0, 2).reshape(*keys.shape[:2], -1)[:, :, :num_tokens]
        return total, size, label

    def step(_: jax.Array, centroid: jax.Array) -> jax.Array:
        total, size, _ = labelled(centroid)
        return jnp.where(size[..., None] > 0, total / jnp.maximum(size, 1)[..., None], centroid)

    centroid = lax.fori_loop(0, iterations, step, centroid)
    _, size, label = labelled(centroid)
    return centroid, label, size.astype(jnp.int32)
