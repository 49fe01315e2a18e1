"""Prefill and the mass passes: every case on every backend that can run or be interpreted here."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import prefill as op
from pallas_kernels.prefill import blocked
from pallas_kernels.prefill.cases import CASES
from tests.kernels.backends import backends, results
from tests.laws.parts import normal


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends("prefill"))
def test_a_backend_equals_the_reference(backend, name):
    case = CASES[name]
    got, want = results(getattr(op, case.function), case, backend)
    tolerance = 2e-2 if case.dtype != "float32" else 2e-5
    if case.function == "prefill_with_mass":
        (got, received), (want, wanted) = got, want
        chex.assert_trees_all_close(received, wanted, rtol=tolerance, atol=tolerance)
    elif case.function != "prefill":
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
        return
    chex.assert_trees_all_close(
        *(acc / jnp.where(total > 0, total, 1)[..., None] for acc, _, total in (got, want)), atol=tolerance
    )
    chex.assert_trees_all_close(*(top + jnp.log(total) for _, top, total in (got, want)), atol=tolerance)


def test_a_block_keeps_no_more_exponentials_than_it_may(monkeypatch):
    case = CASES["with-mass-odd-soft-cap"]
    want = case.arguments()
    one_pass = op.prefill_with_mass(*want[0], **want[1], implementation="blocked")
    for room in (64 * 4 * 2 * 2 * 3 * 768, 0):  # for blocks of 64 queries, and for none: two passes
        monkeypatch.setattr(blocked, "MASS_BYTES", room)
        jax.clear_caches()
        chex.assert_trees_all_close(
            op.prefill_with_mass(*want[0], **want[1], implementation="blocked"), one_pass, rtol=1e-5, atol=1e-5
        )


def test_mass_adds_up_to_the_queries():
    q, k, v = normal(0, 2, 2, 3, 40, 16), normal(1, 2, 2, 90, 16), normal(2, 2, 2, 90, 16)
    start, length = jnp.array([50, 3]), jnp.array([40, 37])
    _, top, total = op.prefill(q, k, v, start)
    received = op.mass(q, k, top + jnp.log(total), start, length)
    chex.assert_trees_all_close(received.sum(-1), jnp.broadcast_to(length[:, None] * 3.0, (2, 2)), rtol=1e-4)


def test_unknown_implementations_and_shapes_are_refused():
    q, k = jnp.zeros((1, 1, 1, 4, 8)), jnp.zeros((1, 1, 4, 8))
    with pytest.raises(ValueError, match="implementation='fast'"):
        op.prefill(q, k, k, jnp.zeros(1, jnp.int32), implementation="fast")
    with pytest.raises(ValueError, match=r"needs q \[B, K, G, T, D\]"):
        op.prefill(q[0], k, k, jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="equal B, K and D"):
        op.prefill(q, k, k, jnp.zeros(2, jnp.int32))
