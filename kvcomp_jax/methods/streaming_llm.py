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
def streaming_llm(context: Context, *, budget: int | float = 512, num_sinks: int = 4) -> LayerSpec:
    """Keep the first `num_sinks` tokens and the most recent ones, `budget` tokens together.

    Keys keep the positions they have in the text, as in kvpress; the paper's positions inside the cache equal these for
    the recent tokens and differ for the sinks.
    """
    tokens = context.tokens(budget)
    if tokens <= num_sinks:
        raise ValueError(f"budget={tokens} tokens must exceed num_sinks={num_sinks}.")
    return LayerSpec(policy=Recency(num_sinks=num_sinks), window=tokens - num_sinks)
