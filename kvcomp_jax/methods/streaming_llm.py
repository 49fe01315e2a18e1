"""StreamingLLM, Xiao et al. 2023, arXiv:2309.17453."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Recency
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="StreamingLLM, Xiao et al. 2023, arXiv:2309.17453",
    advice="Endless streams where only the recent text matters; the cheapest of all.",
    settings=("budget=0.5", "budget=0.25"),
)
def streaming_llm(
    context: Context, *, budget: int | float = 512, num_sinks: int = 4, positions: str = "text"
) -> tuple[LayerSpec, ...]:
    """Keep the first `num_sinks` tokens and the most recent ones, `budget` tokens together.

    Keys keep the positions they have in the text, as in kvpress; `positions=cache` counts positions inside the cache,
    as the paper does, so that a text may go on beyond those that the model was made for. They differ for the sinks
    alone: recent tokens stand as far from the query either way. There the paper stores keys before their rotation
    and rotates all of them at each step; here the query turns to meet the sinks.
    """
    tokens, layout = context.tokens(budget), context.layout
    if tokens <= num_sinks:
        raise ValueError(f"budget={tokens} tokens must exceed num_sinks={num_sinks}.")
    if positions not in ("text", "cache"):
        raise ValueError(f"positions={positions!r} must be 'text' or 'cache'.")
    ropes = [None] * layout.num_layers
    if positions == "cache":
        if not any(layout.ropes):
            raise ValueError("positions=cache needs a model whose keys are rotated (RoPE); take positions=text.")
        ropes = [layout.rope(layer, context.max_len) for layer in range(layout.num_layers)]
    policy = Recency(num_sinks=num_sinks)
    return tuple(LayerSpec(policy=policy, window=tokens - num_sinks, close_gap=rope) for rope in ropes)
