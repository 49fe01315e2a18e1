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
    by_head = weight.reshape(weight.shape[0], heads, -1, dim).transpose(2, 1, 3, 0)  # [G, K, D, M]
    total = jnp.zeros((heads, batch, num_tokens))
    for head in by_head:  # one of each group at a time: T x M floats a KV head
        made = jnp.einsum("btkd,kdm->kbtm", v, head.astype(v.dtype), preferred_element_type=jnp.float32)
        total += jnp.abs(made).sum(-1)
    return jnp.moveaxis(total, 0, -1) / len(by_head)
