"""Faithfulness of CriticalKV: half by attention, the rest by attention times the norm of values."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import make, normal, prefill, qkv
from tests.methods import test_expected_attention
from tests.methods.brute import held
from tests.methods.votes import chosen, votes


def norms(v, weight=None):
    """L1 norms [K, S] of v [S, K, D], or of what weight [M, K * G * D] makes of them, averaged over each group."""
    v = np.asarray(v, np.float64)
    if weight is None:
        return np.abs(v).sum(-1).T
    by_head = np.asarray(weight, np.float64).reshape(len(weight), v.shape[1], -1, v.shape[2])
    return np.abs(np.einsum("skd,mkgd->ksgm", v, by_head)).sum(-1).mean(-1)


def two_stages(score, norm, candidates, num, first, epsilon):
    """Sets of `num` candidates: a share by score [K, S], then by score times the norm [K, S]."""
    stage = chosen(score, candidates, int(first * num))
    weighted = (score + epsilon) * norm[:, : score.shape[1]]
    return [
        best | chosen(weighted[h : h + 1], [t for t in candidates if t not in best], num - len(best))[0]
        for h, best in enumerate(stage)
    ]


@pytest.mark.parametrize("first", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("budget", ["40", "0.5"])
def test_votes_weighted_by_values(budget, projected, first):
    lengths, window, sinks = [90, 61], 8, 2
    q, k, v = qkv(0, 2, 90, heads=(6, 2))
    v = v * (1 + jnp.arange(90) % 7)[None, :, None, None]
    text = f"critical_kv:budget={budget},by=snapkv,window={window},num_sinks={sinks},{first=},epsilon=0.01,{projected=}"
    cache = make(text, batch=2, num_kv_heads=2, max_len=100, prompt_lens=lengths)
    weight = normal(3, 24, 6 * 64) * (1 + jnp.arange(6 * 64) % 5)[None] if projected else None
    norm = kvc.output_norm(v, weight) if projected else None
    _, cache = prefill(cache, q, k, v, jnp.array(lengths), output_norm=norm)
    for row, n in enumerate(lengths):
        num = (int(0.5 * n) if budget == "0.5" else 40) - window - sinks
        score = votes(q[row, :n], k[row, :n], window=window, kernel_size=7, pooling="max")
        candidates = range(sinks, n - window)
        best = two_stages(score, norms(v[row, :n], weight), candidates, num, first, 0.01)
        always = {*range(sinks), *range(n - window, n)}
        assert held(cache, row) == [head | always for head in best]


def test_expected_attention_weighted_by_values(monkeypatch):
    monkeypatch.setattr(test_expected_attention, "FUTURE", 512)
    q, k, v = qkv(1, 1, 80, heads=(6, 2))
    q, v = q + 0.5, v * (1 + jnp.arange(80) % 5)[None, :, None, None]
    layout = kvc.Layout(num_layers=1, num_kv_heads=2, head_dim=64, ropes=(test_expected_attention.ROPE,))
    plan = kvc.parse("critical_kv:budget=30,projected=false").plan(layout, max_len=90, prompt_len=80)
    policy = plan.specs[0].policy
    assert (policy.first, policy.epsilon, policy.num_sinks) == (0.5, 1e-4, 4)
    _, cache = prefill(plan.init(batch=1, dtype=jnp.float32)[0], q, k, v)
    score = test_expected_attention.expected_scores(q[0], k[0], v[0], values=False)
    best = two_stages(score, norms(v[0]), range(4, 80), 26, 0.5, 1e-4)
    assert held(cache) == [head | set(range(4)) for head in best]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("critical_kv:first=1.5", r"first=1.5 must be in \[0, 1\]"),
        ("critical_kv:by=h2o", "by='h2o' must be 'snapkv' or 'expected_attention'"),
    ],
)
def test_impossible_settings_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=100, head_dim=64)
