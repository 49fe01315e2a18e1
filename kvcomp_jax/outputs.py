"""How much each value can change a layer's output, for policies by which that counts."""

import jax
import jax.numpy as jnp

from kvcomp_jax.cache import LayerCache
from kvcomp_jax.prompt import PromptCache


def wants_output_norm(cache: LayerCache | PromptCache) -> bool:
    """Whether `attend` needs `output_norm` of the next chunk: a prompt's policy weighs values by what is made of them.

    Only of a first prompt, since later ones are not ranked anew.
    """
    return isinstance(cache, PromptCache) and cache.weighs_outputs


def output_norm(v: jax.Array, weight: jax.Array) -> jax.Array:
    """The L1 norm of what the output projection makes of each value, mean over the query heads that share it.

    Args:
      v: [B, T, K, D].
      weight: [M, H * D], of the output projection, H a multiple of K; query heads of a group stand together.

    Returns:
      f32[B, T, K].

    Raises:
      ValueError: If the weight's columns are no multiple of K * D.

    Source: CriticalKV, Feng et al. 2025, arXiv:2502.03805, section 3.
    """
    batch, num_tokens, heads, dim = v.shape
    if weight.ndim != 2 or weight.shape[1] % (heads * dim):
        raise ValueError(f"weight {weight.shape} must be [M, H * {dim}] with H a multiple of {heads} KV heads.")
    by_head = weight.reshape(weight.shape[0], heads, -1, dim).transpose(1, 2, 0, 3)  # [K, G, M, D]
    rows = v.transpose(2, 3, 0, 1).reshape(heads, dim, -1)  # [K, D, B T]; sums over M are then sums of whole vectors

    def norm(weight: jax.Array, x: jax.Array) -> jax.Array:
        made = jnp.einsum("md,dn->mn", weight.reshape(-1, dim).astype(x.dtype), x, preferred_element_type=jnp.float32)
        return jnp.abs(made).sum(0)

    # One KV head at a time: G M B T floats.
    total = jnp.stack([norm(weight, x) for weight, x in zip(by_head, rows, strict=True)], -1)
    return total.reshape(batch, num_tokens, heads) * (heads * dim / weight.shape[1])
