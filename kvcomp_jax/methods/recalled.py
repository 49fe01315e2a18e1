"""What methods share that keep every token and let each query read some."""

import dataclasses

from kvcomp_jax.methods.full import full
from kvcomp_jax.methods.registry import Context
from kvcomp_jax.policies import Recency
from kvcomp_jax.retrieval import Index, Lookup
from kvcomp_jax.spec import LayerSpec, exact_rung, room


def recalled(
    context: Context,
    index: Index,
    budget: int | float,
    *,
    full_layers: int,
    block_size: int,
    num_sinks: int = 0,
    window: int = 0,
    counted: int | None = None,
    recalls: int | None = None,
    memory: str = "device",
) -> tuple[LayerSpec, ...]:
    """Read `budget` tokens a step in all layers but the first `full_layers`, which read everything.

    Args:
      context: The model and lengths.
      index: Chooses what is read.
      budget: Tokens, or a fraction of the prompt, with what is always read: sinks, window, and `counted`.
      full_layers: Layers that read everything.
      block_size: Later tokens that enter the index together.
      num_sinks: First tokens, always read.
      window: Latest tokens, always read.
      recalls, memory: See `Lookup`.
      counted: Tokens of the budget for those that wait for their block; None is `block_size`.

    Raises:
      ValueError: If the budget leaves no page to choose, unless it is a fraction: then it is one page at least; or if
        copies on the device shall be of what each query head reads, and nobody says how many there are.
    """
    layers = context.layout.num_layers
    if full_layers < 0:
        raise ValueError(f"full_layers={full_layers} must not be negative.")
    full_layers = min(full_layers, layers)
    total = context.tokens(budget)
    always = num_sinks + window + (block_size if counted is None else counted)
    tokens = total - always
    if isinstance(budget, float):
        tokens = max(tokens, index.page_size)
    if tokens < index.page_size:
        raise ValueError(
            f"budget={total} tokens must leave a page of {index.page_size} beside the {always} that are always read."
        )
    whole = full(context)
    if total >= context.max_len:  # all is always read
        return (whole,) * layers
    lists = _query_heads(context) if memory == "host" and index.heads == "query" else 1
    lookup = Lookup(index, tokens, recalls, memory, lists)
    rung = dataclasses.replace(exact_rung(room(context.max_len, block_size)), lookup=lookup)
    policy = Recency(num_sinks=num_sinks, num_queries=lookup.num_queries)
    spec = LayerSpec(rungs=(rung,), policy=policy, window=window, block_size=block_size)
    return (whole,) * full_layers + (spec,) * (layers - full_layers)


def _query_heads(context: Context) -> int:
    """Query heads of a KV head."""
    if context.layout.num_heads is None:
        raise ValueError(
            "memory='host' with heads='query' keeps at hand what each query head reads: state Layout.num_heads, or let "
            "those of a KV head read the same (heads=kv)."
        )
    return context.layout.num_heads // context.layout.num_kv_heads
