"""Which tokens are worth keeping: one policy a file."""

from kvcomp_jax.policies.base import Policy, Probes, Prompt
from kvcomp_jax.policies.heavy_hitter import HeavyHitter
from kvcomp_jax.policies.recency import Recency
from kvcomp_jax.policies.saliency import Saliency

__all__ = ["HeavyHitter", "Policy", "Probes", "Prompt", "Recency", "Saliency"]
