"""Decode attention over packed rows: every case on every backend that can run or be interpreted here."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_decode import quantized_decode
from pallas_kernels.quantized_decode.cases import CASES, Case, channel, token
from tests.kernels.backends import backends, results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends("quantized_decode"))
def test_a_backend_equals_the_reference(backend, name):
    got, want = results(quantized_decode, CASES[name], backend)
    tolerance = 2e-2 if CASES[name].dtype == "bfloat16" or backend == "hopper" else 2e-4
    assert_same_attention(got, want, tolerance)


def assert_same_attention(got, want, tolerance):
    """Equal outputs and log-sum-exps; where no slot is live, sum 0, a finite max and acc 0."""
    seen = np.asarray(want[2] > 0)
    np.testing.assert_array_equal(np.asarray(got[2] > 0), seen)
    assert all(bool(jnp.isfinite(x).all()) for x in got)
    out = [np.asarray(acc / jnp.where(total > 0, total, 1.0)[..., None]) for acc, _, total in (got, want)]
    np.testing.assert_allclose(*out, rtol=tolerance, atol=tolerance * max(np.abs(out[1]).max(), 1e-6))
    lse = [np.asarray(top + jnp.log(jnp.where(total > 0, total, 1.0)))[seen] for _, top, total in (got, want)]
    np.testing.assert_allclose(*lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name", ["k3-token-v8-channel", "whole-head-symmetric", "positions-per-head", "bfloat16-query"]
)
def test_shapes_are_those_of_the_arguments(name):
    chex.assert_trees_all_equal_shapes_and_dtypes(CASES[name].shapes(), CASES[name].arguments()[0])


def test_bad_calls_are_refused():
    (q, k, v, length, _, _), options = Case(channel(4), token(4)).arguments()
    with pytest.raises(ValueError, match="implementation='fast' must be None or one of"):
        quantized_decode(q, k, v, length, **options, implementation="fast")
    with pytest.raises(ValueError, match="does not fit codes of keys"):
        quantized_decode(q[..., :32], k, v, length, **options)
    with pytest.raises(ValueError, match="pos and q_pos come together"):
        quantized_decode(q, k, v, length, **{**options, "sliding_window": 3})
    chex.assert_shape(quantized_decode(q, k, v, length, **options, implementation="reference")[0], q.shape)
