"""Which kernels read a cache on this machine, and why no better ones."""

import dataclasses

import jax
import jax.numpy as jnp

from kvcomp_jax.cache import LayerCache
from kvcomp_jax.retrieval.read import attend_selected
from kvcomp_jax.tiers import FUSED_ROWS, Queries, Tier, as_stored, attend_stored, fused_kernel
from pallas_kernels.dispatch import Choice, recording


@dataclasses.dataclass(frozen=True)
class TierKernel:
    """How a decode step reads one rung.

    Attributes:
      codecs: Names of the codecs of K and V.
      operation: The fused operation on the rows as they are stored, or "dot and mix" where the codecs have none.
      backend: Which implementation of it; "xla" for dot and mix.
      reasons: (better backend, why it was not taken), best first.
    """

    codecs: tuple[str, str]
    operation: str
    backend: str
    reasons: tuple[tuple[str, str], ...]


def kernels_in_use(cache: LayerCache, *, num_heads: int | None = None) -> tuple[TierKernel, ...]:
    """Say for each rung of a cache what reads it in `decode`, by tracing and without running anything.

    Args:
      cache: One layer's, arrays or ShapeDtypeStructs.
      num_heads: Query heads of the model; None is one a KV head.
    """
    batch, num_kv_heads, _, head_dim = cache.window.k.shape
    rows = (num_heads or num_kv_heads) // num_kv_heads
    queries = Queries(
        q=jax.ShapeDtypeStruct((batch, num_kv_heads, rows, head_dim), jnp.float32),
        pos=jax.ShapeDtypeStruct((batch, rows), jnp.int32),
        sliding_window=cache.spec.sliding_window,
        groups=rows,
    )
    return tuple(_of_tier(cache, tier, queries) for tier in cache.tiers)


def _of_tier(cache: LayerCache, tier: Tier, queries: Queries) -> TierKernel:
    codecs = (tier.k_codec.name, tier.v_codec.name)
    policy = cache.spec.policy
    if tier.heads is not None:
        rows = (queries.q.shape[0], len(tier.heads), *queries.q.shape[2:])
        queries = dataclasses.replace(queries, q=jax.ShapeDtypeStruct(rows, jnp.float32))
    why = None
    if tier.lookup is not None:
        return _of_lookup(codecs, tier, queries, policy.num_sinks)
    entering, tier = tier.k_codec, as_stored(tier)
    if tier.stat is not None and policy.needs_probs:
        why = f"{type(policy).__name__} needs each token's probability, which the fused read does not return."
    elif tier.head is not None:
        why = "KV heads share its slots, which fused reads do not know."
    elif fused_kernel(tier) is None:
        why = f"no fused read for keys of {codecs[0]} and values of {codecs[1]}."
    elif queries.q.shape[2] > FUSED_ROWS:
        why = f"{queries.q.shape[2]} query heads a KV head exceed {FUSED_ROWS}."
    if why:
        return TierKernel(codecs, "dot and mix", "xla", (("fused", why),))
    queries = dataclasses.replace(queries, q=jax.eval_shape(lambda codec, q: codec.enter(q), entering, queries.q))
    with recording() as choices:
        jax.eval_shape(lambda q, t: attend_stored(q, t, policy.num_sinks), queries, tier)
    choice: Choice = choices[-1]
    return TierKernel(codecs, choice.operation, choice.backend, choice.reasons)


def _of_lookup(codecs: tuple[str, str], tier: Tier, queries: Queries, num_sinks: int) -> TierKernel:
    with recording() as choices:
        jax.eval_shape(lambda q, t: attend_selected(q, t, num_sinks), queries, tier)
    if not choices:
        copied = tier.lookup is not None and tier.lookup.pool is not None
        what = "fused read of copies" if copied else "read of selected pages in place"
        why = f"no {what} for keys of {codecs[0]} and values of {codecs[1]} by this index."
        return TierKernel(codecs, "dot and mix" if copied else "gather, dot and mix", "xla", (("fused", why),))
    return TierKernel(codecs, choices[-1].operation, choices[-1].backend, choices[-1].reasons)
