"""What a calibration sees of one layer."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvcomp_jax.rotary import Rotary


class Activations(NamedTuple):
    """Keys, values and queries of one layer on N sequences of T tokens, and how much the loss minds the first two.

    The weights are squares of the loss's gradient, the diagonal of the empirical Fisher information.
    """

    k: np.ndarray  # f32[N, T, K, D], before rotation to positions
    v: np.ndarray  # f32[N, T, K, D]
    k_weight: np.ndarray  # f32[N, T, K, D]
    v_weight: np.ndarray  # f32[N, T, K, D]
    q: np.ndarray | None = None  # f32[N, T, H, D], before rotation, scaled
    rope: Rotary | None = None  # how keys and queries are rotated
    o_weight: np.ndarray | None = None  # f32[M, H * D], of the output projection


# (activations, *, options of the method) -> arrays by name; stacked over layers they are a calibration.
Calibrate = Callable[..., dict[str, np.ndarray]]
