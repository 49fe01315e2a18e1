"""PyramidKV, Cai et al. 2024, arXiv:2406.02069."""

from kvcomp_jax.budgets import pyramid
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.selected_prompt import selected_prompt
from kvcomp_jax.policies import WindowVote
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="PyramidKV, Cai et al. 2024, arXiv:2406.02069",
    advice="Small budgets on long prompts, where early layers need most of them; else the same budget everywhere.",
    settings=("budget=0.5", "budget=0.25"),
)
def pyramid_kv(
    context: Context,
    *,
    budget: int | float = 2048,
    beta: float = 20.0,
    window: int = 64,
    kernel_size: int = 5,
    pooling: str = "avg",
    num_sinks: int = 0,
    block_size: int = 16,
) -> tuple[LayerSpec, ...]:
    """Choose tokens of the prompt by the votes of its last `window`, fewer in each layer than in the one before.

    `budget` is the mean over layers; they fall linearly, and the last layer's is `budget / beta`, but not below the
    window and one token, or in a composition one block, nor the first one's above the prompt less the window (of a
    budget in tokens, the longest prompt of the batch). Budgets count the window, as in kvpress, whose defaults these
    are; where these bounds do not fit, kvpress gives all layers the same.
    """
    layers, tokens, least = context.layout.num_layers, context.tokens(budget), num_sinks + window + context.least
    if beta < 1:
        raise ValueError(f"beta={beta} must be at least 1.")
    shrink = isinstance(budget, float)
    if tokens < least and not shrink:
        raise ValueError(f"budget={tokens} tokens must exceed num_sinks={num_sinks} + window={window}.")
    last = max(tokens / beta, min(least, tokens))
    prompt = context.prompt_len if shrink else context.longest
    if prompt is not None:
        last = max(last, min(2 * tokens - (prompt - window), tokens))
    budgets = pyramid(tokens * layers, layers, ratio=(2 * tokens - last) / last)
    policy = WindowVote(num_queries=window, kernel_size=kernel_size, pooling=pooling, num_sinks=num_sinks)
    sizes = {"window": window, "block_size": block_size, "shrink": shrink}
    return tuple(selected_prompt(context, policy, tokens, **sizes) for tokens in budgets)
