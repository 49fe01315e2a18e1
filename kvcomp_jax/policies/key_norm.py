"""Tokens with small keys."""

import jax
import jax.numpy as jnp

from kvcomp_jax.policies.base import Prompt, Stat
from kvcomp_jax.policies.prompt_rank import PromptRank
from kvcomp_jax.types import pytree


@pytree
class KeyNorm(PromptRank):
    """Rank a prompt's tokens by how short their keys are: what is attended to most has the smallest norm.

    No query is asked. Source: Devoto et al. 2024, arXiv:2406.11430.
    """

    @property
    def looks_at_prompt(self) -> bool:
        """True: at its keys."""
        return True

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> jax.Array:
        """Minus the L2 norm of each key, f32[B, K, S]."""
        del stat
        return -jnp.linalg.norm(prompt.k.astype(jnp.float32), axis=-1)
