"""Statistics of a prompt chunk against the whole matrix of probabilities."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import prefill as op
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.prefill.reference import capped, visible
from tests.kernels.backends import backends
from tests.laws.parts import normal

CASES = {
    # T, S, starts, lengths, soft_cap, sliding_window, dtype of keys
    "one": (1, 1, (0, 0), (1, 0), None, None, "float32"),
    "whole": (90, 90, (0, 0), (90, 71), None, None, "float32"),
    "blocks": (600, 600, (0, 0), (600, 5), None, None, "float32"),
    "chunk": (64, 700, (0, 500), (64, 60), None, None, "float32"),
    "soft-cap": (130, 515, (385, 3), (130, 0), 20.0, None, "float32"),
    "window": (150, 150, (0, 0), (150, 140), None, 17, "float32"),
    "chunk-window": (40, 900, (860, 20), (40, 39), 30.0, 300, "float32"),
    "bfloat16": (64, 704, (0, 500), (64, 60), None, None, "bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", *backends("prefill")])
def test_statistics_are_those_of_the_whole_matrix(backend, name):
    num_queries, slots, starts, lengths, soft_cap, sliding_window, dtype = CASES[name]
    q = normal(0, 2, 2, 3, num_queries, 16)
    k, v = normal(1, 2, 2, slots, 16).astype(dtype), normal(2, 2, 2, slots, 16).astype(dtype)
    start, length = jnp.array(starts), jnp.array(lengths)
    rng = np.random.default_rng(0)
    probes = jnp.asarray(rng.permuted(np.tile(np.arange(num_queries), (2, 1)), axis=-1)[:, : num_queries // 5 + 1])
    probes = probes.at[0, 0].set(-1)
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    call = functools.partial(
        op.prefill_with_statistics, **options, last_window=8, key_norms=True, implementation=backend, interpret=True
    )
    try:
        state, found = jax.jit(lambda *args: call(*args[:-1], probes=args[-1]))(q, k, v, start, length, probes)
    except Unsupported as reason:
        pytest.skip(str(reason))
    chex.assert_trees_all_equal_shapes(state, op.prefill(q, k, v, start, **options, implementation="reference"))

    t = np.arange(num_queries)
    live = np.asarray(visible(start, jnp.asarray(t), jnp.arange(slots), sliding_window))
    logits = capped(jnp.einsum("bkgtd,bksd->bkgts", q, k.astype(jnp.float32)), soft_cap)
    probs = np.where(live, np.exp(logits - jax.scipy.special.logsumexp(logits, -1, where=live, keepdims=True)), 0)
    real = t < np.asarray(length)[:, None]
    voting = real & (t >= np.asarray(length)[:, None] - 8)
    probing = real & (t[None, :, None] == np.asarray(probes)[:, None]).any(-1)
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-4
    for got, rows in ((found.votes, voting), (found.probed, probing)):
        want = np.einsum("bkgts,bt->bks", probs, rows)
        np.testing.assert_allclose(got, want, atol=tolerance)
    slot = np.arange(slots)
    fresh = (slot >= np.asarray(start)[:, None]) & (slot < np.asarray(start + length)[:, None])
    squares = np.einsum("bksd,bs->bkd", np.square(np.asarray(k, np.float32)), fresh)
    np.testing.assert_allclose(found.key_squares, squares, rtol=1e-5)


def test_only_what_is_asked_for_is_computed():
    q, k = normal(0, 1, 1, 1, 4, 8), normal(1, 1, 1, 4, 8)
    zero = jnp.zeros(1, jnp.int32)
    assert op.statistics(q, k, jnp.zeros((1, 1, 1, 4)), zero, zero + 4) == op.Statistics(None, None, None)


def test_votes_store_no_matrix():
    def call(q, k, v, start, length, probes):
        return op.prefill_with_statistics(
            q, k, v, start, length, last_window=32, probes=probes, implementation="blocked"
        )

    shape, i32 = jax.ShapeDtypeStruct, jnp.int32
    rows = shape((1, 2, 4096, 16), jnp.float32)
    q = shape((1, 2, 2, 4096, 16), jnp.float32)
    compiled = jax.jit(call).lower(q, rows, rows, shape((1,), i32), shape((1,), i32), shape((1, 400), i32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096  # a quarter of one head's probabilities


def test_bad_calls_are_refused():
    q, k, at = jnp.zeros((1, 1, 1, 4, 8)), jnp.zeros((1, 1, 6, 8)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"needs q \[B, K, G, N, D\]"):
        op.probe_mass(q, k[..., :4], jnp.zeros((1, 1, 1, 4)), at)
    with pytest.raises(ValueError, match=r"must be \[B, N\]"):
        op.probe_mass(q, k, jnp.zeros((1, 1, 1, 4)), at[:, :3])
