"""Law 3: states form a commutative monoid, and any split of the tokens gives the whole."""

import chex
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from kvcomp_jax.attention import AttnState, finalize, from_logits, lse, merge, psum_merge, unit
from tests.laws.parts import normal


def state_of(seed, tokens, live=True) -> AttnState:
    logits, v = normal(seed, 2, 3, tokens) * 4, normal(seed + 1, 2, tokens, 8)
    return from_logits(logits, jnp.asarray(live), lambda p: p @ v)[0]


@given(seed=st.integers(0, 2**16), sizes=st.tuples(*[st.integers(1, 9)] * 3))
def test_merge_is_a_commutative_monoid(seed, sizes):
    a, b, c = (state_of(seed + 10 * i, n) for i, n in enumerate(sizes))
    chex.assert_trees_all_close(merge(a, b), merge(b, a), rtol=1e-6)
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    chex.assert_trees_all_close(finalize(left), finalize(right), atol=1e-5)
    chex.assert_trees_all_close(lse(left), lse(right), atol=1e-5)
    chex.assert_trees_all_close(merge(a, unit(a.acc.shape)), a, rtol=1e-6)


@given(seed=st.integers(0, 2**16), split=st.integers(0, 12))
def test_a_split_in_any_place_equals_the_whole(seed, split):
    logits, v = normal(seed, 2, 3, 12) * 5, normal(seed + 1, 2, 12, 8)
    whole = jax.nn.softmax(logits, -1) @ v

    def part(lo, hi):
        if lo == hi:
            return unit((2, 3, 8))
        return from_logits(logits[..., lo:hi], jnp.asarray(True), lambda p: p @ v[:, lo:hi])[0]

    joined = finalize(merge(part(0, split), part(split, 12)))
    chex.assert_trees_all_close(joined, whole, atol=1e-5)


def test_queries_without_live_tokens_give_zero_and_not_nan():
    dead = state_of(0, 5, live=False)
    chex.assert_trees_all_equal(finalize(dead), jnp.zeros((2, 3, 8)))
    alive = state_of(3, 5)
    chex.assert_trees_all_close(finalize(merge(dead, alive)), finalize(alive), rtol=1e-6)


@pytest.mark.parametrize("devices", [2, 4])
def test_psum_merge_equals_merge(devices):
    if jax.device_count() < devices:
        pytest.skip(f"needs {devices} devices, have {jax.device_count()}")
    mesh = jax.make_mesh((devices,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    logits, v = normal(0, 2, 3, 16) * 5, normal(1, 2, 16, 8)

    def local(logits, v):
        return finalize(psum_merge(from_logits(logits, jnp.asarray(True), lambda p: p @ v)[0], "seq"))

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(None, None, "seq"), P(None, "seq")), out_specs=P())
    chex.assert_trees_all_close(sharded(logits, v), jax.nn.softmax(logits, -1) @ v, atol=1e-5)
