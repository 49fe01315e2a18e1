"""How much of each, per layer."""

import math


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


def falling(at: float, last: float, schedule: str = "cosine") -> float:
    """A factor that falls from 1 at=0 to `last` at=1, along half a cosine or a line."""
    if schedule not in ("cosine", "linear"):
        raise ValueError(f"schedule={schedule!r} must be 'cosine' or 'linear'.")
    left = (math.cos(math.pi * at) + 1) / 2 if schedule == "cosine" else 1 - at
    return (1 - last) * left + last


def nested(
    num_tokens: int, num_layers: int, *, decay: float, interval: int = 1, schedule: str = "cosine", least: int = 0
) -> tuple[int, ...]:
    """How many of `num_tokens` each layer sees if every `interval` layers only a share is passed on.

    The share falls from 1 in the first layer towards `decay`, see `falling`; shares multiply, rounded down each time.
    Where no more than `least` tokens would be left, all are passed on.

    Raises:
      ValueError: If `decay` is not in (0, 1], `interval` below 1, or the schedule unknown.

    Source: PyramidInfer, Yang et al. 2024, arXiv:2405.12532; its linear schedule rises, and its code does not use it.
    """
    if not 0 < decay <= 1 or interval < 1:
        raise ValueError(f"decay={decay} must be in (0, 1] and interval={interval} at least 1.")
    seen = [num_tokens]
    shares = [falling(layer / num_layers, decay, schedule) for layer in range(num_layers)]
    for layer, share in enumerate(shares[:-1]):
        passed = int(seen[-1] * share)
        prunes = layer % interval == 0 and share < 1 and passed > least and seen[-1] > least
        seen.append(passed if prunes else seen[-1])
    return tuple(seen)
