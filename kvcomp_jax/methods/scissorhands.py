"""Scissorhands, Liu et al. 2023, arXiv:2305.17118."""

from kvcomp_jax.budgets import pyramid
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Persistence
from kvcomp_jax.spec import LayerSpec, exact_rung


@method(
    axis="select",
    bits="16 or 32",
    source="Scissorhands, Liu et al. 2023, arXiv:2305.17118",
    advice="A fixed number of tokens for ever, evicted many at a time; models with rotary positions want num_sinks=4.",
    settings=("budget=0.5", "budget=0.2"),
)
def scissorhands(
    context: Context,
    *,
    budget: int | float = 512,
    history: int = 400,
    recent: int = 10,
    drop: int | float = 0.5,
    spread: float = 0.25,
    num_sinks: int = 0,
) -> tuple[LayerSpec, ...]:
    """Once there are `budget` tokens, evict those most often below average in the last `history` queries.

    The last `recent` stay, in short prompts at most half of a budget that is a fraction. `drop` tokens go at once, or
    that share of those that may go; then as many come before the next are dropped. Later layers get more, linearly from
    1 - `spread` to 1 + `spread` of the mean budget: the paper says so without the numbers; a prompt that fits the mean
    but not the first layer's budget loses tokens there. `history` and `recent` are
    the paper's. A gentler setting: `history=256,recent=64,drop=0.125,num_sinks=4`.
    """
    if not 0 <= spread < 1:
        raise ValueError(f"spread={spread} must be in [0, 1).")
    tokens, layers = context.tokens(budget), context.layout.num_layers
    if isinstance(budget, float):
        recent = min(recent, tokens // 2)
    budgets = pyramid(tokens * layers, layers, ratio=(1 + spread) / (1 - spread))
    policy = Persistence(history=history, num_sinks=num_sinks)
    return tuple(_layer(policy, tokens, recent, drop) for tokens in reversed(budgets))


def _layer(policy: Persistence, tokens: int, recent: int, drop: int | float) -> LayerSpec:
    rest = tokens - policy.num_sinks - recent
    if rest < 1 or recent < 0:
        raise ValueError(f"budget={tokens} tokens of a layer must exceed num_sinks={policy.num_sinks} + {recent=}.")
    if not 0 < drop <= (1 if isinstance(drop, float) else rest):
        raise ValueError(f"drop={drop} must be a share in (0, 1], or up to {rest} tokens, those that may go.")
    share = drop if isinstance(drop, float) else drop / rest
    return LayerSpec(rungs=(exact_rung(rest),), policy=policy, window=recent, drop=share)
