"""Confidence intervals of shares."""

import math
from statistics import NormalDist


def wilson(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share seen as `successes` of `trials`, honest also at 0 and 1.

    Scores between 0 and 1 may be summed as successes: they vary less than a yes or no of the same mean, so the interval
    is then too wide rather than too narrow.

    Source: Wilson 1927, Journal of the American Statistical Association 22.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} must be between 0 and trials={trials}, at least 1.")
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), successes / trials
    spread = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    middle, stretch = share + z * z / (2 * trials), 1 + z * z / trials
    low, high = (middle - spread) / stretch, (middle + spread) / stretch
    return min(max(low, 0.0), share), max(min(high, 1.0), share)  # rounding may cross the share at 0 and 1
