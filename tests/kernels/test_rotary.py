"""Cosines and sines of angles that are many turns: right to 1e-6."""

import numpy as np
import pytest

from pallas_kernels.rotary import cos_sin, cosine

ANGLES = np.concatenate([
    np.random.default_rng(0).uniform(0, 2**16 * 2 * np.pi, 20_000),
    np.random.default_rng(1).uniform(0, 100, 20_000),
    np.arange(8) * np.pi / 2,
]).astype(np.float32)  # fmt: skip


def test_cosines_and_sines_of_large_angles():
    cos, sin = cos_sin(ANGLES)
    np.testing.assert_allclose(cos, np.cos(ANGLES.astype(np.float64)), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(ANGLES.astype(np.float64)), atol=1e-6)


@pytest.mark.parametrize("phase", [-np.pi, -1.0, 0.0, np.pi / 2, np.pi])
def test_cosines_of_large_angles_less_a_phase(phase):
    phase = np.float32(phase)
    want = np.cos(ANGLES.astype(np.float64) - np.float64(phase))
    np.testing.assert_allclose(cosine(ANGLES, phase), want, atol=1e-6)
