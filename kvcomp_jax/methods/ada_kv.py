"""AdaKV, Feng et al. 2024, arXiv:2407.11550."""

import dataclasses

from kvcomp_jax.methods.expected_attention import expected_attention
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.snapkv import snapkv
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="AdaKV, Feng et al. 2024, arXiv:2407.11550",
    advice="Small budgets on long prompts: heads that look at few tokens leave theirs to those that look at many.",
    settings=("budget=0.5", "budget=0.25", "budget=0.5,by=expected_attention"),
)
def ada_kv(
    context: Context,
    *,
    budget: int | float = 2048,
    safeguard: float = 0.2,
    by: str = "snapkv",
    window: int = 32,
    kernel_size: int = 7,
    pooling: str = "max",
    block_size: int = 16,
) -> tuple[LayerSpec, ...]:
    """Keep a prompt's best tokens over all KV heads of a layer, so that heads differ in how many they hold.

    `budget` is the mean over heads; each gets at least `safeguard` of it beside the window. The heads share one buffer
    of exactly so many slots. Tokens are scored as in SnapKV, with its options, or by=expected_attention with that
    method's defaults. All that follows the prompt is kept. The paper's code mixes counts with the mean instead of
    keeping the safeguard's tokens first; this is kvpress' way, and `safeguard` the default of both.
    """
    if by == "snapkv":
        votes = {"window": window, "kernel_size": kernel_size, "pooling": pooling}
        specs = (snapkv(context, budget=budget, block_size=block_size, **votes),) * context.layout.num_layers
    elif by == "expected_attention":
        specs = expected_attention(context, budget=budget, block_size=block_size)
    else:
        raise ValueError(f"by={by!r} must be 'snapkv' or 'expected_attention'.")
    policies = [dataclasses.replace(spec.policy, least_share=safeguard) for spec in specs]
    return tuple(dataclasses.replace(spec, policy=policy) for spec, policy in zip(specs, policies, strict=True))
