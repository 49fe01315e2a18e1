"""KV heads that share the slots of a row: how many each gets by score, and which slot serves which.

Slots that heads share have no head axis: arrays are [B, 1, S, ...], and each slot names the head that it serves.
"""

import jax
import jax.numpy as jnp


def side_by_side(x: jax.Array) -> jax.Array:
    """[B, K, n, ...] -> [B, 1, K * n, ...], one head after the other."""
    return x.reshape(x.shape[0], 1, -1, *x.shape[3:])


def owners(batch: int, num_kv_heads: int, num: int) -> jax.Array:
    """The head of each slot of `side_by_side`, u8[B, 1, K * num]."""
    head = jnp.repeat(jnp.arange(num_kv_heads, dtype=jnp.uint8), num)
    return jnp.broadcast_to(head, (batch, 1, num_kv_heads * num))


def share(score: jax.Array, mean: jax.Array, unit: int, least: float) -> jax.Array:
    """Share `mean` tokens a head among the heads of each row: those with the highest scores, wherever they are.

    Args:
      score: f32[B, K, S], -inf where there is no token.
      mean: i32[B], a multiple of `unit`; each head has at least so many tokens.
      unit: Tokens that are kept together: a head gets a multiple. Units of a head are made by rank.
      least: Share of the mean that each head gets at least, to a thousandth, in whole units.

    Returns:
      i32[B, K], tokens of each head; their sum is K * mean.
    """
    batch, heads, _ = score.shape
    ranked = -jnp.sort(-score, -1)
    ranked = jnp.pad(ranked, ((0, 0), (0, 0), (0, -score.shape[-1] % unit)), constant_values=-jnp.inf)
    worth = ranked.reshape(batch, heads, -1, unit).mean(-1)  # [B, K, U], descending
    safe = mean * round(least * 1000) // 1000 // unit
    rank = jnp.arange(worth.shape[-1])[None, None]
    worth = jnp.where((rank < safe[:, None, None]) & (worth > -jnp.inf), jnp.inf, worth)
    best = jnp.argsort(-worth.reshape(batch, -1), -1, stable=True)
    place = jnp.argsort(best, -1).reshape(worth.shape)
    chosen = (place < (heads * mean // unit)[:, None, None]) & (worth > -jnp.inf)
    return chosen.sum(-1, dtype=jnp.int32) * unit


def assign(counts: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Give slots to heads in turn, as many as counts i32[B, K] say.

    Returns:
      The head of each slot and which of that head's slots it is, i32[B, num_slots], and whether it is any head's.
    """
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    end = jnp.cumsum(counts, -1)
    head = (slot[None, :, None] >= end[:, None]).sum(-1, dtype=jnp.int32)
    first = jnp.take_along_axis(end - counts, head, -1, mode="clip")
    return jnp.minimum(head, counts.shape[-1] - 1), slot[None] - first, slot[None] < end[:, -1:]
