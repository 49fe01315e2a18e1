"""Faithfulness of TOVA against brute force."""

import chex
import jax.numpy as jnp
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import decode, make, prefill, qkv, settle
from tests.methods.brute import causal_probs, held, output, probs_where, seen_by


def drop_to(kept, mass, budget, latest):
    """Keep the latest token and the heaviest of the others."""
    for t in sorted(kept - {latest}, key=lambda t: mass[t])[: max(len(kept) - budget, 0)]:
        kept.remove(t)


@pytest.mark.parametrize("prompt", [40, 9], ids="prompt={}".format)
def test_each_step_drops_what_the_latest_query_attends_to_least(prompt):
    steps, budget = 25, 16
    q, k, v = qkv(prompt, 1, prompt + steps)
    cache = make(f"tova:budget={budget}", batch=1, num_kv_heads=2, max_len=prompt + steps)
    _, cache = prefill(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    kept = set(range(prompt))
    drop_to(kept, causal_probs(q[0, :prompt], k[0, :prompt])[:, :, -1].mean((0, 1)), budget, prompt - 1)
    assert held(cache) == [kept] * 2
    for t in range(prompt, prompt + steps):
        kept.add(t)
        p = probs_where(q[0, t : t + 1], k[0], seen_by([kept], prompt + steps))
        out, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        chex.assert_trees_all_close(out[0], jnp.asarray(output(p, v[0]), jnp.float32), atol=1e-5)
        cache = settle(cache)
        drop_to(kept, p[:, :, 0].mean((0, 1)), budget, t)
        assert held(cache) == [kept] * 2  # all heads the same


def test_padding_does_not_vote():
    q, k, v = qkv(7, 1, 33)
    caches = []
    for padding in (0, 3):
        cache = make("tova:budget=16", batch=1, num_kv_heads=2, max_len=40)
        _, cache = prefill(cache, q[:, : 30 + padding], k[:, : 30 + padding], v[:, : 30 + padding], jnp.array([30]))
        caches.append(held(cache))
    assert caches[0] == caches[1]


def test_a_budget_of_one_token_is_refused():
    with pytest.raises(ValueError, match="budget=1 tokens must exceed num_sinks=0 and the latest token"):
        kvc.parse("tova:budget=1").spec(max_len=100, head_dim=64)
