"""Which tokens are worth keeping: one policy a file."""

from kvcomp_jax.policies.base import Policy, Probes, Prompt, Stat, Step, Watched
from kvcomp_jax.policies.distinct import Distinct
from kvcomp_jax.policies.expected_attention import ExpectedAttention
from kvcomp_jax.policies.heavy_hitter import HeavyHitter
from kvcomp_jax.policies.key_norm import KeyNorm
from kvcomp_jax.policies.last_query import LastQuery
from kvcomp_jax.policies.persistence import Persistence
from kvcomp_jax.policies.prompt_rank import PromptRank
from kvcomp_jax.policies.recency import Recency
from kvcomp_jax.policies.rehearsed import Rehearsed
from kvcomp_jax.policies.saliency import Saliency
from kvcomp_jax.policies.tail_vote import TailVote
from kvcomp_jax.policies.value_weighted import ValueWeighted
from kvcomp_jax.policies.window_vote import WindowVote

__all__ = [
    "Distinct",
    "ExpectedAttention",
    "HeavyHitter",
    "KeyNorm",
    "LastQuery",
    "Persistence",
    "Policy",
    "Probes",
    "Prompt",
    "PromptRank",
    "Recency",
    "Rehearsed",
    "Saliency",
    "Stat",
    "Step",
    "TailVote",
    "ValueWeighted",
    "Watched",
    "WindowVote",
]
