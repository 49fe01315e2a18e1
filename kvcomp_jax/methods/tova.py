"""TOVA, Oren et al. 2024, arXiv:2401.06104."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import LastQuery
from kvcomp_jax.spec import LayerSpec, exact_rung


@method(
    axis="select",
    bits="16 or 32",
    source="TOVA, Oren et al. 2024, arXiv:2401.06104",
    advice="A fixed number of tokens for ever, with no statistic to gather in the prompt; every step needs "
    "probabilities.",
    settings=("budget=0.5", "budget=0.25"),
)
def tova(context: Context, *, budget: int | float = 512, num_sinks: int = 0) -> LayerSpec:
    """Drop the token that the latest query attends to least, at every step, once there are more than `budget`.

    Attention is averaged over the heads of a layer, which keep the same tokens; the latest token always stays. A
    prompt is cut to the budget by its last query. Defaults are the paper's: no sinks, they survive by themselves.
    """
    tokens = context.tokens(budget)
    kept = max(tokens - num_sinks - 1, 0)
    if kept < 1:
        raise ValueError(f"budget={tokens} tokens must exceed num_sinks={num_sinks} and the latest token.")
    return LayerSpec(rungs=(exact_rung(kept),), policy=LastQuery(num_sinks=num_sinks), window=1)
