"""Which tokens are worth keeping: one policy a file."""

from kvcomp_jax.policies.base import Policy, Probes, Prompt, Stat, Step
from kvcomp_jax.policies.distinct import Distinct
from kvcomp_jax.policies.expected_attention import ExpectedAttention
from kvcomp_jax.policies.heavy_hitter import HeavyHitter
from kvcomp_jax.policies.last_query import LastQuery
from kvcomp_jax.policies.persistence import Persistence
from kvcomp_jax.policies.prompt_rank import PromptRank
from kvcomp_jax.policies.recency import Recency
from kvcomp_jax.policies.saliency import Saliency
from kvcomp_jax.policies.window_vote import WindowVote

__all__ = [
    "Distinct",
    "ExpectedAttention",
    "HeavyHitter",
    "LastQuery",
    "Persistence",
    "Policy",
    "Probes",
    "Prompt",
    "PromptRank",
    "Recency",
    "Saliency",
    "Stat",
    "Step",
    "WindowVote",
]
