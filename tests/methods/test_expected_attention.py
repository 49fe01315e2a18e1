"""Faithfulness of Expected Attention against its formulas in numpy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import HEAD_DIM, attend, close_prompt, prefill, qkv
from tests.methods.brute import held
from tests.methods.votes import chosen

SINKS, FUTURE = 4, 32
ROPE = kvc.Rotary(kvc.Constant(1e4 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM).astype(np.float32)), scale=1.1)
OPTIONS = f"num_future={FUTURE}"


def rotation(pos, scale):
    """The matrix [D, D] that rotates a row to a position."""
    angle = pos * 1e4 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
    return np.block([[cos, sin], [-sin, cos]]) * scale  # x @ this


def expected_scores(q, k, v, *, covariance=True, values=True, rope=True):
    """Scores [K, T] of one row's rotated q [T, H, D] for k, v [T, K, D]; column 0 .. SINKS - 1 are of sinks."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    tokens, heads = len(k), k.shape[1]
    before = [q[t] @ np.linalg.inv(rotation(t, 1.1)) for t in range(tokens)] if rope else q
    before = np.stack(before)[SINKS:].reshape(tokens - SINKS, heads, -1, HEAD_DIM)
    to_come = np.mean([rotation(tokens + i, 1.1) for i in range(FUTURE)], 0) if rope else np.eye(HEAD_DIM)
    scores = np.zeros((heads, tokens))
    for head in range(heads):
        keys, groups = k[SINKS:, head], []
        for group in range(before.shape[2]):
            x = before[:, head, group]
            mean = x.mean(0) @ to_come
            cov = to_come.T @ ((x - x.mean(0)).T @ (x - x.mean(0)) / len(x)) @ to_come
            logits = keys @ mean / np.sqrt(HEAD_DIM)
            if covariance:
                logits += np.einsum("nd,de,ne->n", keys, cov, keys) / HEAD_DIM / 2
            p = np.exp(logits - logits.max())
            groups.append(p / p.sum())
        scores[head, SINKS:] = np.mean(groups, 0) * (np.linalg.norm(v[SINKS:, head], axis=-1) if values else 1)
    return scores


def empty(options, lengths, max_len, rope=ROPE):
    layout = kvc.Layout(num_layers=1, num_kv_heads=2, head_dim=HEAD_DIM, ropes=(rope,))
    plan = kvc.parse(f"expected_attention:{options},{OPTIONS}").plan(layout, max_len=max_len, prompt_len=max(lengths))
    return plan.init(batch=len(lengths), dtype=jnp.float32, prompt_lens=lengths)[0]


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "none"])
@pytest.mark.parametrize("covariance", [True, False], ids=["covariance", "mean"])
@pytest.mark.parametrize("values", [True, False], ids=["values", "keys"])
def test_keeps_what_the_formulas_say(covariance, values, rope):
    lengths = [90, 50]
    q, k, v = qkv(0, 2, 90, heads=(6, 2))
    q, v = q + 0.5, v * (1 + jnp.arange(90) % 5)[None, :, None, None]
    cache = empty(f"budget=0.4,{covariance=},{values=}", lengths, 100, ROPE if rope else None)
    _, cache = prefill(cache, q, k, v, jnp.array(lengths))
    for row, n in enumerate(lengths):
        score = expected_scores(*(x[row, :n] for x in (q, k, v)), covariance=covariance, values=values, rope=rope)
        best = chosen(score, range(SINKS, n), int(0.4 * n) - SINKS)
        assert held(cache, row) == [head | set(range(SINKS)) for head in best]


def test_chunks_are_judged_as_the_whole_prompt_and_keep_no_query():
    q, k, v = qkv(1, 2, 96)
    q = q + jnp.arange(96)[None, :, None, None] / 24  # means of chunks differ
    lengths = jnp.array([96, 70])
    whole = empty("budget=40", [96, 70], 100)
    prompt = kvc.open_prompt(whole, 96, num_heads=4)
    size = sum(x.nbytes for x in jax.tree.leaves(prompt.watched))
    _, whole = prefill(whole, q, k, v, lengths)
    for i in range(3):
        rest = jnp.clip(lengths - 32 * i, 0, 32)
        _, prompt = attend(prompt, *(x[:, 32 * i : 32 * (i + 1)] for x in (q, k, v)), rest)
    assert held(close_prompt(prompt), 0) == held(whole, 0)
    assert held(close_prompt(prompt), 1) == held(whole, 1)
    assert size == 4 * 2 * (1 + 4 * HEAD_DIM * (HEAD_DIM + 1)) == sum(x.nbytes for x in jax.tree.leaves(prompt.watched))


def test_frequencies_that_change_are_refused():
    rope = kvc.Rotary(ROPE.inv_freq, max_len=64)
    with pytest.raises(ValueError, match="once a text exceeds 64 tokens"):
        empty("budget=40", [50], 65, rope)
