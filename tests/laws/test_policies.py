"""Policies that judge a prompt by some of its queries: chunks, rows and turns change nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import HEAD_DIM, HEADS, PROBING, attend, close_prompt, decode_many, prefill, qkv

LENGTHS = [90, 41, 1, 0]


def empty(policy, batch, heads, window=200):
    """A cache whose window holds every token with its statistic."""
    spec = kvc.LayerSpec(
        rungs=(kvc.Rung(kvc.Identity(), kvc.Identity(), 16),), policy=policy, window=window, block_size=16
    )
    return kvc.init(spec, batch=batch, num_kv_heads=heads[1], head_dim=HEAD_DIM, dtype=jnp.float32)


def stat_of(cache):
    """Statistic of every token of each row after the sinks: a list of f32[K, n]."""
    sinks = cache.spec.policy.num_sinks
    return [cache.window.stat[row, :, : max(int(n) - sinks, 0)] for row, n in enumerate(cache.length)]


def in_chunks(cache, q, k, v, lengths, chunk, capacity, **options):
    prompt, lengths = kvc.open_prompt(cache, capacity, num_heads=q.shape[2], **options), jnp.asarray(lengths)
    for start in range(0, q.shape[1], chunk):
        here = slice(start, start + chunk)
        _, prompt = attend(prompt, q[:, here], k[:, here], v[:, here], jnp.clip(lengths - start, 0, chunk))
    return close_prompt(prompt)


@pytest.mark.parametrize(("policy", "heads"), list(zip(PROBING, HEADS, strict=True)), ids=str)
def test_chunks_change_nothing(policy, heads):
    q, k, v = qkv(0, 4, 96, heads)
    _, whole = prefill(empty(policy, 4, heads), q, k, v, jnp.array(LENGTHS))
    for chunk, capacity in ((12, 96), (96, 150)):
        parts = in_chunks(empty(policy, 4, heads), q, k, v, LENGTHS, chunk, capacity)
        chex.assert_trees_all_close(stat_of(parts), stat_of(whole), atol=1e-6)


@pytest.mark.parametrize("policy", PROBING, ids=repr)
def test_rows_have_the_statistic_that_each_has_alone(policy):
    q, k, v = qkv(1, 4, 96)
    _, together = prefill(empty(policy, 4, (4, 2)), q, k, v, jnp.array(LENGTHS))
    for row, n in enumerate(LENGTHS):
        if n:
            one = (slice(row, row + 1), slice(0, n))
            _, alone = prefill(empty(policy, 1, (4, 2)), q[one], k[one], v[one])
            chex.assert_trees_all_close(stat_of(together)[row], stat_of(alone)[0], atol=1e-6)


@pytest.mark.parametrize("policy", PROBING, ids=repr)
def test_later_turns_are_judged_by_their_own_probes(policy):
    first, turn = 40, 50
    q, k, v = qkv(2, 1, first + turn)
    _, cache = prefill(empty(policy, 1, (4, 2)), q[:, :first], k[:, :first], v[:, :first])
    before = stat_of(cache)[0]
    rest = [x[:, first:] for x in (q, k, v)]
    after = in_chunks(cache, *rest, [turn], 16, 64, fresh=False)
    one_pass = in_chunks(cache, *rest, [turn], 50, 50, fresh=False)
    chex.assert_trees_all_close(stat_of(after), stat_of(one_pass), atol=1e-6)

    after = stat_of(after)[0]
    assert after.shape[1] == first + turn - policy.num_sinks
    assert bool((after > 0).all())
    assert not bool(jnp.allclose(after[:, : before.shape[1]], before))  # old tokens take the new queries into account


@pytest.mark.parametrize("policy", PROBING, ids=repr)
def test_statistics_stay_finite_and_structures_the_same(policy):
    q, k, v = qkv(4, 2, 40)
    start = empty(policy, 2, (4, 2), window=8)
    _, cache = prefill(start, q[:, :20], k[:, :20], v[:, :20], jnp.array([20, 0]))
    _, cache = decode_many(cache, q[:, 20:], k[:, 20:], v[:, 20:])
    assert jax.tree.structure(cache) == jax.tree.structure(start)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(cache) if x.dtype == jnp.float32)


def test_probes_need_the_number_of_query_heads():
    cache = empty(kvc.Saliency(), 1, (4, 2))
    with pytest.raises(ValueError, match="num_heads=None must be the model's query heads, a multiple of 2: Saliency"):
        kvc.open_prompt(cache, 16)
    with pytest.raises(ValueError, match="num_heads=3 must be"):
        kvc.open_prompt(cache, 16, num_heads=3)


@pytest.mark.parametrize("capacity", [1, 2, 10, 19, 20, 100, 1000])
def test_probes_are_their_share_of_the_prompt(capacity):
    policy = kvc.Saliency()
    assert policy.num_probes(capacity) == max(capacity // 20, 1) + capacity // 20
    at = jnp.arange(capacity)[None]
    chosen = np.asarray(policy.choose_probes(at, capacity))[0]
    assert len(set(chosen)) == policy.num_probes(capacity)
    assert set(range(capacity - max(capacity // 20, 1), capacity)) <= set(chosen)


def test_impossible_shares_of_probes_are_refused():
    with pytest.raises(ValueError, match=r"recent=1.5 and random=0.05 are shares of the queries, in \[0, 1\]"):
        kvc.Saliency(recent=1.5)
    with pytest.raises(ValueError, match="divide_by='rows' must be 'probes' or 'queries'"):
        kvc.Saliency(divide_by="rows")
