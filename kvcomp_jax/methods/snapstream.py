"""SnapStream, arXiv:2511.03092."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import WindowVote
from kvcomp_jax.spec import LayerSpec, exact_rung


@method(
    axis="select",
    bits="16 or 32",
    source="SnapStream, 2025, arXiv:2511.03092",
    advice="Long prompts and endless answers in fixed memory: the prompt is chosen from once, answers stream past.",
    settings=("budget=0.5", "budget=0.25"),
)
def snapstream(
    context: Context,
    *,
    budget: int | float = 8192,
    recent: int | float = 0.25,
    num_sinks: int = 4,
    num_queries: int = 32,
    kernel_size: int = 7,
    pooling: str = "max",
) -> LayerSpec:
    """Keep sinks, the prompt's tokens that its last queries vote for, and a ring of recent ones, `budget` together.

    What leaves the ring after the prompt is evicted, and the chosen tokens never change. `recent` is tokens, or a share
    of the budget. Keys keep their positions. The published sizes are not known; voting is SnapKV's default.
    """
    tokens = context.tokens(budget)
    ring = int(recent * tokens) if isinstance(recent, float) else recent
    chosen = tokens - num_sinks - ring
    if chosen < 1 or ring < 1:
        raise ValueError(f"budget={tokens} tokens must exceed num_sinks={num_sinks} + recent={ring}, at least 1.")
    policy = WindowVote(
        num_queries=num_queries, kernel_size=kernel_size, pooling=pooling, keep_later=False, num_sinks=num_sinks
    )
    return LayerSpec(rungs=(exact_rung(chosen),), policy=policy, window=ring)
