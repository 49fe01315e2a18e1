"""SnapKV, Li et al. 2024, arXiv:2404.14469."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.selected_prompt import selected_prompt
from kvcomp_jax.policies import WindowVote
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="SnapKV, Li et al. 2024, arXiv:2404.14469",
    advice="Long prompts with short answers: cheap to choose, nothing to do while decoding.",
    settings=("budget=0.5", "budget=0.25"),
)
def snapkv(
    context: Context,
    *,
    budget: int | float = 2048,
    window: int = 32,
    kernel_size: int = 7,
    pooling: str = "max",
    num_sinks: int = 0,
    block_size: int = 16,
) -> LayerSpec:
    """Keep the prompt's last `window` tokens and those they attend to, `budget` together, and all that follows.

    Each KV head chooses for itself, by the mean over its group; the released code stores a copy for every query head.
    Keys keep their positions. Defaults are those of the paper's LongBench runs (budgets there: 1024, 2048, 4096);
    kvpress has `window=64,kernel_size=5,pooling=avg`. A budget that is a fraction counts the window, as in kvpress;
    where it is too small for that, the window shrinks.
    """
    policy = WindowVote(num_queries=window, kernel_size=kernel_size, pooling=pooling, num_sinks=num_sinks)
    tokens, shrink = context.tokens(budget), isinstance(budget, float)
    return selected_prompt(context, policy, tokens, window=window, block_size=block_size, shrink=shrink)
