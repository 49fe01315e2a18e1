"""KV-cache compression in JAX: exact, composable, jit-compiled parts."""

from kvcomp_jax.accounting import Bytes, forecast, live_tokens, nbytes
from kvcomp_jax.attention import AttnState, causal_attention, finalize, lse, merge, psum_merge
from kvcomp_jax.cache import LayerCache, init, settle
from kvcomp_jax.codecs import (
    AcrossHeads,
    Affine,
    ChannelScaled,
    Codebook,
    Codec,
    Float4,
    Float8,
    Homomorphic,
    Identity,
    Outliers,
    PerChannel,
    PreRope,
    Rotated,
    Sketched,
    TensorTrain,
)
from kvcomp_jax.kernels import TierKernel, kernels_in_use
from kvcomp_jax.methods import METHODS, Context, Method, MethodInfo, method, parse
from kvcomp_jax.plan import CachePlan, Layout
from kvcomp_jax.policies import (
    ExpectedAttention,
    HeavyHitter,
    LastQuery,
    Persistence,
    Policy,
    Probes,
    Prompt,
    Recency,
    Saliency,
    WindowVote,
)
from kvcomp_jax.prompt import PromptCache, attend, close_prompt, detach, open_prompt, positions, prefill
from kvcomp_jax.read import decode
from kvcomp_jax.retrieval import Bounds, Centroids, Lookup
from kvcomp_jax.rotary import Rotary
from kvcomp_jax.rows import free_row, insert_row
from kvcomp_jax.spec import LayerSpec, Rung
from kvcomp_jax.types import Constant

__all__ = [
    "METHODS",
    "AcrossHeads",
    "Affine",
    "AttnState",
    "Bounds",
    "Bytes",
    "CachePlan",
    "Centroids",
    "ChannelScaled",
    "Codebook",
    "Codec",
    "Constant",
    "Context",
    "ExpectedAttention",
    "Float4",
    "Float8",
    "HeavyHitter",
    "Homomorphic",
    "Identity",
    "LastQuery",
    "LayerCache",
    "LayerSpec",
    "Layout",
    "Lookup",
    "Method",
    "MethodInfo",
    "Outliers",
    "PerChannel",
    "Persistence",
    "Policy",
    "PreRope",
    "Probes",
    "Prompt",
    "PromptCache",
    "Recency",
    "Rotary",
    "Rotated",
    "Rung",
    "Saliency",
    "Sketched",
    "TensorTrain",
    "TierKernel",
    "WindowVote",
    "attend",
    "causal_attention",
    "close_prompt",
    "decode",
    "detach",
    "finalize",
    "forecast",
    "free_row",
    "init",
    "insert_row",
    "kernels_in_use",
    "live_tokens",
    "lse",
    "merge",
    "method",
    "nbytes",
    "open_prompt",
    "parse",
    "positions",
    "prefill",
    "psum_merge",
    "settle",
]
