"""What a calibration sees of one layer."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Activations(NamedTuple):
    """Keys and values of one layer on N sequences of T tokens, and how much the loss minds their errors.

    The weights are squares of the loss's gradient, the diagonal of the empirical Fisher information.
    """

    k: np.ndarray  # f32[N, T, K, D], before rotation to positions
    v: np.ndarray  # f32[N, T, K, D]
    k_weight: np.ndarray  # f32[N, T, K, D]
    v_weight: np.ndarray  # f32[N, T, K, D]


# (activations, *, options of the method) -> arrays by name; stacked over layers they are a calibration.
Calibrate = Callable[..., dict[str, np.ndarray]]
