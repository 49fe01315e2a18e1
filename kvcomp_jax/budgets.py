"""How much of each, per layer."""


def pyramid(total_tokens: int, num_layers: int, *, ratio: float = 4.0) -> tuple[int, ...]:
    """Share a token budget over layers, falling linearly from first to last.

    Budgets around a whole mean are rounded half to even, as kvpress does; what a mean that is not whole leaves over
    goes to the first layers, one token each.

    Args:
      total_tokens: Slots summed over layers, per sequence and kv head.
      num_layers: Layers to share them.
      ratio: First layer's budget divided by the last one's, >= 1.

    Returns:
      One budget per layer, in tokens, each >= 1; their sum is `total_tokens`.

    Raises:
      ValueError: If `ratio < 1`, or a layer's budget is below 1 token.

    Source: PyramidKV, Cai et al. 2024, arXiv:2406.02069 (there the last budget is the mean over `beta`: a ratio of
    2 beta - 1). PyramidInfer, Yang et al. 2024, arXiv:2405.12532, has a decay per layer; linear here.
    """
    if num_layers < 1 or ratio < 1:
        raise ValueError(f"num_layers={num_layers} must be at least 1 and ratio={ratio} at least 1.")
    mean, rest = divmod(total_tokens, num_layers)
    last = 2 * mean / (1 + ratio)
    step = 2 * (mean - last) / max(num_layers - 1, 1)
    budgets = [round(mean + (mean - last) - i * step) if num_layers > 1 else mean for i in range(num_layers)]
    budgets = [budget + (i < rest) for i, budget in enumerate(budgets)]
    if sum(budgets) != total_tokens:  # a mean that is whole makes the roundings cancel, but for those of a float
        budgets[0] += total_tokens - sum(budgets)
    if min(budgets) < 1:
        raise ValueError(
            f"total_tokens={total_tokens} over {num_layers} layers with ratio={ratio} leaves a layer without a token: "
            "take more tokens or a smaller ratio."
        )
    return tuple(budgets)
