"""H2O, Zhang et al. 2023, arXiv:2306.14048."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import HeavyHitter
from kvcomp_jax.spec import LayerSpec, exact_rung


@method(
    axis="select",
    bits="16 or 32",
    source="H2O, Zhang et al. 2023, arXiv:2306.14048",
    advice="A fixed number of tokens for ever, chosen by attention; every step needs probabilities.",
    settings=("budget=0.5", "budget=0.2"),
)
def h2o(
    context: Context,
    *,
    budget: int | float = 512,
    recent: int | None = None,
    num_sinks: int = 0,
    block_size: int = 1,
) -> LayerSpec:
    """Keep the `recent` tokens (half the budget) and those that received the most attention, `budget` together.

    Evicts at every step, as in the paper; `block_size=n` evicts n tokens every n steps. Mass is summed over the query
    heads of a group; the paper has no grouped heads.
    """
    tokens = context.tokens(budget)
    window = tokens // 2 if recent is None else recent
    heavy = tokens - num_sinks - window
    if heavy < 1 or window < 0:
        raise ValueError(f"budget={tokens} tokens must exceed num_sinks={num_sinks} + recent={window}.")
    policy = HeavyHitter(num_sinks=num_sinks)
    return LayerSpec(rungs=(exact_rung(heavy),), policy=policy, window=window, block_size=block_size)
