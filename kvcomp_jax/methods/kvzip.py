"""KVzip, Kim et al. 2025, arXiv:2505.23416."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.selected_prompt import selected_prompt
from kvcomp_jax.policies import Rehearsed
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="KVzip, Kim et al. 2025, arXiv:2505.23416",
    advice="A prompt that many questions will be asked of: the best choice there is, at two or three times the cost.",
    settings=("budget=0.5", "budget=0.25", "budget=0.5,safeguard=none"),
)
def kvzip(
    context: Context,
    *,
    budget: int | float = 2048,
    safeguard: float | None = 0.0,
    chunk: int = 2048,
    num_sinks: int = 4,
    block_size: int = 16,
) -> LayerSpec:
    """Keep the prompt's tokens that the model looks at when it is told to repeat the prompt, and all that follows.

    The model reads the prompt a second time, in chunks. The heads of a layer share `budget` tokens a head, each with at
    least a share `safeguard` of it; none gives all the same. The paper shares over layers, too; here each has its
    budget. Chunks of 2048 tokens and the instruction are the paper's, four sinks its code's.
    """
    policy = Rehearsed(chunk=chunk, least_share=safeguard, num_sinks=num_sinks)
    tokens, shrink = context.tokens(budget), isinstance(budget, float)
    return selected_prompt(context, policy, tokens, window=0, block_size=block_size, shrink=shrink)
