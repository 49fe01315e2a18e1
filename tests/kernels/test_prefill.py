"""The blocked prefill against its reference, chunks and odd sizes included."""

import chex
import jax.numpy as jnp
import pytest

from pallas_kernels import prefill as op
from tests.laws.parts import normal

CASES = [
    # T, S, starts, soft_cap, sliding_window
    (1, 1, (0, 0), None, None),
    (7, 7, (0, 0), None, None),
    (600, 600, (0, 0), None, None),
    (64, 700, (0, 500), None, None),
    (130, 515, (385, 3), 20.0, None),
    (300, 300, (0, 0), None, 17),
    (40, 900, (860, 20), 30.0, 300),
]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("queries", "slots", "starts", "soft_cap", "window"), CASES)
def test_blocked_equals_reference(queries, slots, starts, soft_cap, window, groups):
    q, k, v = normal(0, 2, 2, groups, queries, 16), normal(1, 2, 2, slots, 16), normal(2, 2, 2, slots, 16)
    start, options = jnp.array(starts), {"soft_cap": soft_cap, "sliding_window": window}
    states = [op.prefill(q, k, v, start, **options, implementation=i) for i in ("reference", "blocked")]
    outs = [acc / total[..., None] for acc, _, total in states]
    chex.assert_trees_all_close(*outs, atol=1e-5)
    lse = states[0][1] + jnp.log(states[0][2])
    length = jnp.array([queries, max(queries - 3, 0)])
    masses = [op.mass(q, k, lse, start, length, **options, implementation=i) for i in ("reference", "blocked")]
    chex.assert_trees_all_close(*masses, atol=1e-4)
    chex.assert_trees_all_close(masses[0].sum(-1), jnp.broadcast_to(length[:, None] * groups * 1.0, (2, 2)), rtol=1e-4)


def test_unknown_implementations_and_shapes_are_refused():
    q, k = jnp.zeros((1, 1, 1, 4, 8)), jnp.zeros((1, 1, 4, 8))
    with pytest.raises(ValueError, match="implementation='fast'"):
        op.prefill(q, k, k, jnp.zeros(1, jnp.int32), implementation="fast")
    with pytest.raises(ValueError, match=r"needs q \[B, K, G, T, D\]"):
        op.prefill(q[0], k, k, jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="equal B, K and D"):
        op.prefill(q, k, k, jnp.zeros(2, jnp.int32))
