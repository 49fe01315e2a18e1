"""Prompts that get shorter from layer to layer: which tokens a layer hands on to the next."""

from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.cache import Exact, LayerCache
from kvcomp_jax.prompt import PromptCache, as_seen


def hands_on(prompt: LayerCache | PromptCache, following: LayerCache | PromptCache) -> bool:
    """Whether the layer of `following` sees fewer of a prompt's tokens than that of `prompt`, which has read it.

    Only where all of a prompt comes in one chunk, which leaves it open: `open_prompt(cache, 0)`.
    """
    if not isinstance(prompt, PromptCache) or not isinstance(following, PromptCache):
        return False
    if prompt.policy is None or not prompt.policy.hands_on or prompt.staged is None or not following.in_one_chunk:
        return False
    before, after = cast(LayerCache, prompt.base).spec, cast(LayerCache, following.base).spec
    return after.prompt_tokens < min(before.prompt_tokens, prompt.staged.k.shape[2])


def hand_on(prompt: PromptCache, following: PromptCache) -> tuple[jax.Array, jax.Array]:
    """Choose the tokens that the next layer sees, in the order of the text: as many as its cache has room for.

    Args:
      prompt: After its one chunk was read, attached to its cache.
      following: The next layer's, empty, attached to its cache.

    Returns:
      Their indices i32[B, n] among those of `prompt`, and how many of the n each row has, i32[B].
    """
    staged, base, after = cast(Exact, prompt.staged), cast(LayerCache, prompt.base), cast(LayerCache, following.base)
    score = base.spec.policy.worth_passing(as_seen(prompt, base, staged), base.window_limit)
    num_tokens, most = score.shape[1], after.spec.prompt_tokens
    num = jnp.minimum(_room(after), prompt.filled)
    best = lax.top_k(score, most)[1].astype(jnp.int32)
    index = jnp.sort(jnp.where(jnp.arange(most)[None] < num[:, None], best, num_tokens), -1)
    return jnp.minimum(index, num_tokens - 1), num


def _room(cache: LayerCache) -> jax.Array:
    """Tokens of a prompt that each row keeps, i32[B]."""
    rungs = zip(cache.tiers, cache.spec.rungs, strict=True)
    return cache.spec.policy.num_sinks + cache.window_limit + sum(tier.limit - rung.reserve for tier, rung in rungs)
