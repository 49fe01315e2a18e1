"""CriticalKV, Feng et al. 2025, arXiv:2502.03805."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.selected_prompt import selected_prompt
from kvcomp_jax.policies import ExpectedAttention, PromptRank, ValueWeighted, WindowVote
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="CriticalKV, Feng et al. 2025, arXiv:2502.03805",
    advice="As SnapKV or Expected Attention, where values differ much in size; prompts take a seventh longer to read.",
    settings=("budget=0.5", "budget=0.25", "budget=0.5,by=snapkv", "budget=0.5,projected=false"),
)
def critical_kv(
    context: Context,
    *,
    budget: int | float = 2048,
    by: str = "expected_attention",
    first: float = 0.5,
    epsilon: float = 1e-4,
    projected: bool = True,
    window: int = 32,
    kernel_size: int = 7,
    pooling: str = "max",
    num_sinks: int = 4,
    block_size: int = 16,
) -> tuple[LayerSpec, ...]:
    """Choose a share `first` of the tokens by attention, the rest by attention times the norm of values.

    Attention is what queries to come are expected to pay, or with by=snapkv that of the prompt's last `window` tokens.
    The L1 norm is of what the output projection makes of a value, which the model must tell; with projected=false it is
    of the value as cached, and any model will do. Defaults are the paper's and kvpress'.
    """
    layout, tokens, shrink = context.layout, context.tokens(budget), isinstance(budget, float)
    if by not in ("snapkv", "expected_attention"):
        raise ValueError(f"by={by!r} must be 'snapkv' or 'expected_attention'.")
    window = window if by == "snapkv" else 0

    def layer(i: int) -> LayerSpec:
        inner: PromptRank = WindowVote(
            num_queries=max(window, 1), kernel_size=kernel_size, pooling=pooling, num_sinks=num_sinks
        )
        if by == "expected_attention":
            inner = ExpectedAttention(rope=layout.rope(i, context.max_len), use_values=False, num_sinks=num_sinks)
        sizes = {"budget": budget, "beside": window + num_sinks}
        settings = {"first": first, "epsilon": epsilon, "projected": projected, "num_sinks": num_sinks}
        policy = ValueWeighted(inner=inner, **settings, **sizes)
        return selected_prompt(context, policy, tokens, window=window, block_size=block_size, shrink=shrink)

    return tuple(layer(i) for i in range(layout.num_layers))
