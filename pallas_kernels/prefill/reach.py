"""Which blocks of queries see which blocks of slots: what the kernels of the mass pass need not fetch."""

import jax
import jax.numpy as jnp


def query_blocks(
    at: jax.Array, block_q: int, block_k: int, num_slots: int, sliding_window: int | None
) -> tuple[jax.Array, jax.Array]:
    """For each block of slots, find the first block of queries that sees any, and one past the last.

    Args:
      at: i32[B, N], slot at which each query stands; -1 = none.
      block_q, block_k: Queries and slots of a block; last blocks may be shorter.

    Returns:
      i32[B, blocks of slots] each; equal where no query sees anything.
    """
    at = jnp.pad(at, ((0, 0), (0, -at.shape[1] % block_q)), constant_values=-1)
    at = at.reshape(at.shape[0], 1, -1, block_q)  # [B, 1, I, Q]
    slot = jnp.arange(0, num_slots, block_k)[None, :, None]
    sees = at.max(-1) >= slot
    if sliding_window is not None:
        earliest = jnp.where(at < 0, jnp.iinfo(jnp.int32).max, at).min(-1)
        sees &= earliest < slot + block_k - 1 + sliding_window
    first, end = sees.argmax(-1), at.shape[2] - sees[..., ::-1].argmax(-1)
    return first.astype(jnp.int32), jnp.where(sees.any(-1), end, first).astype(jnp.int32)
