"""Expected Attention, Devoto et al. 2025, arXiv:2510.00636."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.selected_prompt import selected_prompt
from kvcomp_jax.policies import ExpectedAttention
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="Expected Attention, Devoto et al. 2025, arXiv:2510.00636",
    advice="The best choice of a prompt's tokens where the questions are not known yet.",
    settings=("budget=0.5", "budget=0.25"),
)
def expected_attention(
    context: Context,
    *,
    budget: int | float = 2048,
    num_future: int = 512,
    num_sinks: int = 4,
    covariance: bool = True,
    values: bool = True,
    block_size: int = 16,
) -> tuple[LayerSpec, ...]:
    """Keep the prompt's tokens that queries like those seen would attend to later, and all that follows.

    Each KV head keeps `budget` tokens, sinks included. Defaults are kvpress'.
    """
    layout, tokens, shrink = context.layout, context.tokens(budget), isinstance(budget, float)

    def layer(i: int) -> LayerSpec:
        policy = ExpectedAttention(
            rope=layout.rope(i, context.max_len),
            num_future=num_future,
            use_covariance=covariance,
            use_values=values,
            num_sinks=num_sinks,
        )
        return selected_prompt(context, policy, tokens, window=0, block_size=block_size, shrink=shrink)

    return tuple(layer(i) for i in range(layout.num_layers))
