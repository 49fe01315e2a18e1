"""Faithfulness of AdaKV: how heads share a budget, that what they do not hold is not there, and what they then see."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.heads import share
from tests.laws.parts import HEAD_DIM, decode_many, make, prefill, qkv
from tests.methods.brute import held, output, probs_where, seen_by
from tests.methods.votes import allotted, votes

TEXT = "ada_kv:budget={budget},window=8,kernel_size=5,pooling=avg"


def uneven(seed, batch, tokens, heads=(6, 2)):
    """Tokens of which the first KV head looks at few and the last at all alike."""
    q, k, v = qkv(seed, batch, tokens, heads)
    sharp = jnp.linspace(3, 0.3, heads[1])
    return q, k * sharp[None, None, :, None], v


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4)], ids=str)
def test_keeps_the_best_over_heads_beside_the_safeguard(safeguard, heads):
    lengths, budget, window = [90, 61], 30, 8
    q, k, v = uneven(0, 2, 90, heads)
    text = f"{TEXT.format(budget=budget)},safeguard={safeguard}"
    cache = make(text, batch=2, num_kv_heads=heads[1], max_len=100, prompt_lens=lengths)
    _, cache = prefill(cache, q, k, v, jnp.array(lengths))
    for row, n in enumerate(lengths):
        score = votes(q[row, :n], k[row, :n], window=window, kernel_size=5, pooling="avg")
        kept = allotted(score, budget - window, safeguard)
        sizes = [len(head) for head in kept]
        assert sum(sizes) == heads[1] * (budget - window)
        assert min(sizes) >= int((budget - window) * safeguard)
        assert (len(set(sizes)) == 1) == (safeguard == 1.0)
        assert held(cache, row) == [head | set(range(n - window, n)) for head in kept]


def test_buffers_are_exactly_the_sum_over_heads():
    layout = kvc.Layout(num_layers=1, num_kv_heads=4, head_dim=HEAD_DIM)
    plan = kvc.parse("ada_kv:budget=0.25").plan(layout, max_len=1024, prompt_len=1024)
    cache = plan.init(batch=2, dtype=jnp.bfloat16)[0]
    slots = 4 * (256 - 32)
    assert cache.tiers[0].k.shape == cache.tiers[0].v.shape == (2, 1, slots, HEAD_DIM)
    window = 4 * (32 + 31) * HEAD_DIM * 2 * 2
    assert kvc.nbytes(cache).allocated == 2 * (slots * (HEAD_DIM * 2 * 2 + 4 + 1) + window + 5 * 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_tokens_held(dtype):
    lengths = [90, 40]
    q, k, v = uneven(1, 2, 90)
    plan = kvc.parse(TEXT.format(budget=0.5)).plan(
        kvc.Layout(num_layers=1, num_kv_heads=2, head_dim=HEAD_DIM), max_len=100, prompt_len=90
    )
    empty = plan.init(batch=2, dtype=jnp.dtype(dtype), prompt_lens=lengths)[0]
    _, cache = prefill(empty, *(x.astype(dtype) for x in (q, k, v)), jnp.array(lengths))
    np.testing.assert_array_equal(kvc.live_tokens(cache), [45, 20])
    tokens = [sum(map(len, held(cache, row))) for row in range(2)]
    assert tokens == [90, 40]
    old = sum(tokens) - 2 * 2 * 8
    counters = 2 * 5 * 4
    assert kvc.nbytes(cache).used == sum(tokens) * 2 * HEAD_DIM * empty.window.k.itemsize + old * 5 + counters
    assert kvc.forecast(plan, lengths, jnp.dtype(dtype)) == kvc.nbytes(cache)


def test_each_head_sees_its_own_tokens_and_all_that_follow():
    prompt, steps = 70, 45
    q, k, v = uneven(2, 1, prompt + steps)
    text = TEXT.format(budget=30) + ",block_size=4"
    cache = make(text, batch=1, num_kv_heads=2, max_len=115, prompt_lens=[prompt])
    _, cache = prefill(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    first = held(cache)
    assert len(first[0]) != len(first[1])
    out, cache = decode_many(cache, q[:, prompt:], k[:, prompt:], v[:, prompt:])
    assert held(cache) == [head | set(range(prompt, prompt + steps)) for head in first]
    keep = seen_by(first, prompt + steps) | (np.arange(prompt + steps) >= prompt)[None, None]
    keep = keep & np.tri(prompt + steps, dtype=bool)[None, prompt:]
    expected = output(probs_where(q[0, prompt:], k[0], keep), v[0])
    chex.assert_trees_all_close(out[0], jnp.asarray(expected, jnp.float32), atol=1e-5)


def test_quantised_units_belong_to_one_head():
    """Channel scales of one head are none of another's: the same tokens, read with the error of their own codes."""
    q, k, v = uneven(3, 1, 400)
    cache = make("ada_kv:budget=150,window=16+kivi:bits=8", batch=1, num_kv_heads=2, max_len=440, prompt_lens=[400])
    _, cache = prefill(cache, q, k, v)
    tier = cache.tiers[0]
    units = np.asarray(tier.head[0, 0]).reshape(-1, tier.unit)
    live = np.asarray(tier.pos[0, 0]).reshape(-1, tier.unit) >= 0
    assert tier.unit == 32
    assert (live == live[:, :1]).all()
    assert (units == units[:, :1])[live].all()
    assert {int(x) for x in np.bincount(units[live]) % tier.unit} == {0}
    sets = held(cache)
    assert len(sets[0]) != len(sets[1])
    out, _ = decode_many(cache, q[:, -1:], k[:, -1:], v[:, -1:])
    keep = seen_by([head | {400} for head in sets], 401)
    more = [jnp.concatenate([x[0], x[0, -1:]]) for x in (k, v)]
    expected = output(probs_where(q[0, -1:], more[0], keep), more[1])
    chex.assert_trees_all_close(out[0], jnp.asarray(expected, jnp.float32), atol=0.03)


def test_prompts_within_the_budget_lose_nothing():
    q, k, v = uneven(4, 1, 60)
    cache = make(TEXT.format(budget=50), batch=1, num_kv_heads=2, max_len=60, prompt_lens=[30])
    _, cache = prefill(cache, q[:, :30], k[:, :30], v[:, :30])
    assert held(cache) == [set(range(30))] * 2
    out, _ = decode_many(cache, *(x[:, 30:] for x in (q, k, v)))
    chex.assert_trees_all_close(out, kvc.causal_attention(q, k, v)[:, 30:], atol=1e-5)


def test_one_kv_head_has_nobody_to_share_with():
    cache = make("ada_kv:budget=40", batch=1, num_kv_heads=1, max_len=64)
    assert cache.tiers[0].head is None


def test_shares_are_whole_units_and_sum_up():
    draw = np.random.default_rng(0)
    score = np.sort(draw.standard_normal((3, 4, 37)) * np.array([1, 5, 0.1, 2])[:, None])
    score[2, :, :5] = -np.inf
    for unit, mean in ((1, [10, 0, 32]), (4, [8, 36, 32]), (8, [16, 32, 24])):
        counts = np.asarray(share(jnp.asarray(score, jnp.float32), jnp.array(mean), unit, 0.5))
        np.testing.assert_array_equal(counts.sum(-1), 4 * np.array(mean))
        assert (counts % unit == 0).all()
        assert (counts >= np.array(mean)[:, None] // 2 // unit * unit).all()
        assert (counts[2] <= 32).all()


def test_scores_of_expected_attention_are_shared_as_well():
    q, k, v = uneven(5, 1, 80)
    sizes = []
    for text in ("ada_kv:budget=30,by=expected_attention", "expected_attention:budget=30"):
        cache = make(text, batch=1, num_kv_heads=2, max_len=90, prompt_lens=[80])
        sizes.append([len(head) for head in held(prefill(cache, q, k, v)[1])])
    assert sizes[1] == [30, 30]
    assert sum(sizes[0]) == 60
    assert sizes[0][0] != sizes[0][1]


def test_what_reads_shared_slots_says_why():
    cache = make("ada_kv:budget=80+int4", batch=1, num_kv_heads=2, max_len=100, prompt_lens=[90])
    (kernel,) = kvc.kernels_in_use(cache)
    assert kernel.operation == "dot and mix"
    assert "heads share its slots" in kernel.reasons[0][1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ada_kv:safeguard=1.5", r"least_share=1.5 of the mean must be in \[0, 1\]"),
        ("ada_kv:by=h2o", "by='h2o' must be 'snapkv' or 'expected_attention'"),
        ("ada_kv:budget=32", r"budget=32 tokens must exceed num_sinks=0 \+ window=32"),
    ],
)
def test_impossible_settings_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=100, head_dim=64)


def test_heads_share_one_rung():
    rung = kvc.Rung(kvc.Identity(), kvc.Identity(), 16)
    with pytest.raises(ValueError, match="heads share the slots of one rung"):
        kvc.LayerSpec(rungs=(rung, rung), policy=kvc.WindowVote(least_share=0.2), window=4)
