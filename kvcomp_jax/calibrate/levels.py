"""Levels of a non-uniform quantiser from data: k-means on a line, weighted, and the correction of two moments."""

import numpy as np


def nearest_levels(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Index of the nearest of ascending levels [n] for each x; of two equally near the lower."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, x, side="left")


def weighted_kmeans(
    x: np.ndarray, weight: np.ndarray, start: np.ndarray, *, max_iter: int = 50
) -> tuple[np.ndarray, list[float]]:
    """Minimise sum(weight * (x - nearest level)**2) by Lloyd's iteration.

    Points are sorted once; an iteration then takes n binary searches, because clusters on a line are intervals.

    Args:
      x: [N], points. weight: [N], not negative.
      start: [n], ascending levels to start with.
      max_iter: Iterations at most; it ends earlier once nothing changes.

    Returns:
      Levels f64[n], ascending; and the loss before each iteration and at the end, which never increases.

    Raises:
      ValueError: If nothing has weight, or a number is not finite.
    """
    if not (np.isfinite(x).all() and np.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError("points and weights must be finite, and weights not negative.")
    if not weight.sum() > 0:
        raise ValueError("all weights are zero; there is nothing to fit levels to.")
    order = np.argsort(x, kind="stable")
    x, weight = x[order].astype(np.float64), weight[order].astype(np.float64)
    weight = weight / weight.mean()
    sums = [np.concatenate([[0.0], np.cumsum(weight * x**power)]) for power in (0, 1, 2)]
    levels, losses = np.array(start, np.float64), []
    for _ in range(max_iter):
        ends = np.searchsorted(x, (levels[1:] + levels[:-1]) / 2, side="right")  # of two equally near the lower
        ends = np.concatenate([[0], ends, [len(x)]])
        mass, first, second = (s[ends[1:]] - s[ends[:-1]] for s in sums)
        losses.append(float((second - 2 * levels * first + levels**2 * mass).sum()))
        moved = np.where(mass > 0, first / np.where(mass > 0, mass, 1.0), levels)
        if np.array_equal(moved, levels):
            return levels, losses
        levels = moved
    return levels, losses


def restore_moments(levels: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Shift and stretch levels so that x, quantised to the nearest old level and read as the new, keeps mean and std.

    Source: Q-Norm of KVQuant, Hooper et al. 2024, arXiv:2401.18079, section 3.5.
    """
    quantised = levels[nearest_levels(x, levels)]
    spread = quantised.std()
    stretch = x.std() / spread if spread > 0 else 1.0
    return levels * stretch + (x.mean() - quantised.mean() * stretch)
