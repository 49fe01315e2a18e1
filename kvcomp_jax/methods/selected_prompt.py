"""What methods share that choose tokens of the prompt once and keep all that come later."""

from kvcomp_jax.methods.registry import Context
from kvcomp_jax.policies import Policy
from kvcomp_jax.spec import LayerSpec, exact_rung


def selected_prompt(
    context: Context, policy: Policy, tokens: int, *, window: int, block_size: int, shrink: bool
) -> LayerSpec:
    """Keep `tokens` of the prompt, its last `window` and its sinks among them, and what follows it up to `max_len`.

    Args:
      context: The model and lengths.
      policy: Ranks the prompt's tokens.
      tokens: Budget of the prompt.
      window: The exact recent tokens.
      block_size: Later tokens that settle together.
      shrink: Whether a budget too small for the window makes it smaller: for fractions of short prompts.

    Raises:
      ValueError: If sinks and window leave no token to choose.
    """
    if shrink:
        window = max(min(window, tokens - policy.num_sinks - 1), 0)
    chosen = tokens - policy.num_sinks - window
    if chosen < 1:
        raise ValueError(f"budget={tokens} tokens must exceed num_sinks={policy.num_sinks} + window={window}.")
    rung = exact_rung(chosen, reserve=context.later)
    return LayerSpec(rungs=(rung,), policy=policy, window=window, block_size=block_size)
