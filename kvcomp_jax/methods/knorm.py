"""Key norms, Devoto et al. 2024, arXiv:2406.11430."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.selected_prompt import selected_prompt
from kvcomp_jax.policies import KeyNorm
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="Key norms, Devoto et al. 2024, arXiv:2406.11430",
    advice="A baseline: asks no query, so choosing is nearly free, and loses more than votes do.",
    settings=("budget=0.5", "budget=0.25"),
)
def knorm(context: Context, *, budget: int | float = 2048, num_sinks: int = 0, block_size: int = 16) -> LayerSpec:
    """Keep the `budget` tokens of the prompt whose keys are shortest, each KV head for itself, and all that follows."""
    policy, tokens, shrink = KeyNorm(num_sinks=num_sinks), context.tokens(budget), isinstance(budget, float)
    return selected_prompt(context, policy, tokens, window=0, block_size=block_size, shrink=shrink)
