"""R-KV, Cai et al. 2025, arXiv:2505.24133."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Distinct
from kvcomp_jax.spec import LayerSpec, exact_rung


@method(
    axis="select",
    bits="16 or 32",
    source="R-KV, Cai et al. 2025, arXiv:2505.24133",
    advice="Long reasoning that repeats itself, in fixed memory: copies of a thought go before the thought does.",
    settings=("budget=0.5", "budget=0.25"),
)
def r_kv(
    context: Context,
    *,
    budget: int | float = 1024,
    buffer: int = 128,
    recent: int = 8,
    importance: float = 0.1,
    kernel_size: int = 7,
    threshold: float = 0.5,
    num_sinks: int = 0,
) -> LayerSpec:
    """Each time `buffer` tokens have come, keep `budget`: the `recent` ones and those that matter and repeat no other.

    So there are up to `budget` + `buffer` tokens, as in the paper. `importance` is the weight of the attention from the
    recent tokens' queries, the rest is that of redundancy. A longer prompt is cut to the budget at once. Defaults are
    the paper's and its released code's. In short prompts at most half of a budget that is a fraction is recent.
    """
    tokens = context.tokens(budget)
    window = min(recent, tokens // 2) if isinstance(budget, float) else recent
    kept = tokens - num_sinks - window
    if kept < 1 or buffer < 1:
        raise ValueError(
            f"budget={tokens} tokens must exceed num_sinks={num_sinks} + recent={window}, and buffer={buffer} be "
            "at least 1."
        )
    policy = Distinct(
        num_queries=recent, kernel_size=kernel_size, weight=importance, threshold=threshold, num_sinks=num_sinks
    )
    return LayerSpec(rungs=(exact_rung(kept, reserve=buffer),), policy=policy, window=window, drop=buffer)
