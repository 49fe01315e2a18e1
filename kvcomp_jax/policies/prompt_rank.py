"""Policies that rank a prompt once and nothing after it."""

import jax
import jax.numpy as jnp

from kvcomp_jax.policies.base import Policy, Stat
from kvcomp_jax.types import pytree, static


@pytree
class PromptRank(Policy):
    """Rank a prompt by what `from_prompt` makes of it, f32[B, K, S], and forget it: caches carry no statistic.

    Later tokens settle without rank while there is room, or never do.

    Attributes:
      keep_later: Whether tokens after the prompt settle; if not, they are evicted when they leave the window, as in
        SnapStream, arXiv:2511.03092.
      least_share: None: every KV head keeps as many tokens. Else the heads of a layer share its slots, by score, and
        each gets at least this share of the mean; AdaKV, arXiv:2407.11550.
    """

    keep_later: bool = static(default=True)
    least_share: float | None = static(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least_share is not None and not 0 <= self.least_share <= 1:
            raise ValueError(f"least_share={self.least_share} of the mean must be in [0, 1].")

    @property
    def pools_heads(self) -> bool:
        """As `least_share` says."""
        return self.least_share is not None

    @property
    def admits_later(self) -> bool:
        """As `keep_later` says."""
        return self.keep_later

    def score(self, stat: Stat | None, pos: jax.Array) -> jax.Array:
        """The rank of a prompt's tokens; after it, first come, first kept."""
        return -pos.astype(jnp.float32) if stat is None else stat
