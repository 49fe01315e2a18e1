"""Faithfulness of SnapStream: sinks, a ring, and tokens of the prompt that never change."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import HEAD_DIM, decode, make, prefill, qkv, settle
from tests.methods.brute import held, output, probs_where, seen_by
from tests.methods.votes import chosen, votes

SINKS, RING, CHOSEN = 3, 12, 10
TEXT = f"snapstream:budget={SINKS + RING + CHOSEN},recent={RING},num_sinks={SINKS},num_queries=6"


def expected_sets(q, k, prompt):
    """What the prompt leaves beside sinks and ring, a set a head."""
    score = votes(q[:prompt], k[:prompt], window=6, kernel_size=7, pooling="max")
    candidates = range(SINKS, max(prompt - RING, SINKS))
    return chosen(score, candidates, CHOSEN)


@pytest.mark.parametrize("prompt", [80, 26, 25, 20, 13], ids="prompt={}".format)
def test_each_step_sees_sinks_the_chosen_and_the_ring(prompt):
    """Prompts beyond the buffer, as large, and smaller: then nothing is lost until the ring turns."""
    steps = 30
    q, k, v = qkv(prompt, 1, prompt + steps)
    cache = make(TEXT, batch=1, num_kv_heads=2, max_len=prompt + steps, prompt_lens=[prompt])
    _, cache = prefill(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    best, allocated = expected_sets(q[0], k[0], prompt), kvc.nbytes(cache).allocated
    whole = kvc.causal_attention(q, k, v)
    if prompt <= SINKS + RING + CHOSEN:
        assert held(cache) == [set(range(prompt))] * 2
    for t in range(prompt, prompt + steps):
        ring = set(range(max(t + 1 - RING, 0), t + 1))
        sets = [head | ring | set(range(min(SINKS, t + 1))) for head in best]
        keep = seen_by(sets, prompt + steps)
        out, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        expected = output(probs_where(q[0, t : t + 1], k[0], keep), v[0])
        chex.assert_trees_all_close(out[0], jnp.asarray(expected, jnp.float32), atol=1e-5)
        if t + 1 <= SINKS + RING:
            chex.assert_trees_all_close(out[0, 0], whole[0, t], atol=1e-5)
        cache = settle(cache)
        assert held(cache) == sets
    assert kvc.nbytes(cache).allocated == allocated


def test_bytes_do_not_depend_on_the_text():
    layout = kvc.Layout(num_layers=1, num_kv_heads=2, head_dim=HEAD_DIM)
    sizes = {}
    for max_len in (2000, 100_000):
        plan = kvc.parse("snapstream:budget=1024").plan(layout, max_len=max_len, prompt_len=1500)
        sizes[max_len] = kvc.forecast(plan, [1500], jnp.bfloat16).allocated
    slots, chosen_slots = 1024 + 1, 1024 - 4 - 256
    assert sizes[2000] == sizes[100_000] == 2 * (slots * 2 * HEAD_DIM * 2 + 4 * chosen_slots) + 5 * 4


def test_it_composes_with_quantised_storage():
    q, k, v = qkv(5, 1, 220)
    cache = make(TEXT.replace("budget=25", "budget=90") + "+int4", batch=1, num_kv_heads=2, max_len=220)
    _, cache = prefill(cache, q[:, :150], k[:, :150], v[:, :150])
    before = np.asarray(cache.tiers[0].pos)
    for t in range(150, 170):
        _, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        cache = settle(cache)
    np.testing.assert_array_equal(cache.tiers[0].pos, before)  # the chosen never change
    assert (before >= 0).all()


@pytest.mark.parametrize("options", ["budget=20,recent=16", "budget=40,recent=0"])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="must exceed num_sinks=4"):
        kvc.parse(f"snapstream:{options}").spec(max_len=100, head_dim=64)
