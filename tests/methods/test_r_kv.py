"""Faithfulness of R-KV: what it keeps and when, against its formulas in numpy, in float64."""

import itertools

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import decode, make, prefill, qkv, settle
from tests.methods.brute import causal_probs, held, output, probs_where, seen_by

BUDGET, BUFFER, RECENT, KERNEL = 30, 12, 5, 3
TEXT = f"r_kv:budget={BUDGET},buffer={BUFFER},recent={RECENT},kernel_size={KERNEL},threshold=0.2"


def repeating(seed, tokens):
    """q, k, v of one row whose keys repeat each other in part."""
    q, k, v = qkv(seed, 1, tokens)
    themes = qkv(seed + 9, 1, 7)[1]
    return q, k + 1.2 * themes[:, jnp.arange(tokens) * 3 % 7], v


def redundancy(k, threshold=0.2):
    """Softmax over tokens [T] of the mean similarity of k [T, D], the newest alike of each key left out."""
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    alike = unit @ unit.T
    np.fill_diagonal(alike, 0)
    for row in alike:
        row[max(np.flatnonzero(row > threshold), default=0)] = 0
    mean = alike.mean(0)
    return np.exp(mean) / np.exp(mean).sum()


def importance(probs):
    """Pooled mean of probs [n, T], those of each query normalised."""
    mean = (probs / probs.sum(-1, keepdims=True)).mean(0)
    half = KERNEL // 2
    padded = np.pad(mean, half)
    return np.stack([padded[i : i + len(mean)] for i in range(KERNEL)]).max(0)


def cut(kept, rows, k, weight=0.1):
    """What remains of a sorted list of tokens, by rows {query: probabilities [S]} of the last queries, keys [S, D]."""
    last = sorted(rows)[-RECENT:]
    old = np.array(kept[:-RECENT])
    score = weight * importance(np.stack([rows[t][old] for t in last]))
    score -= (1 - weight) * redundancy(np.asarray(k, np.float64)[kept])[:-RECENT]
    best = np.sort(old[np.argsort(-score, kind="stable")[: BUDGET - RECENT]])
    return [*best.tolist(), *kept[-RECENT:]]


def simulate(q, k, prompt, steps, weight=0.1):
    """The tokens that each head holds after the prompt and after each step: lists of sets."""
    probs = causal_probs(q[:prompt], k[:prompt]).max(1)  # [K, T, T]
    rows = [{t: probs[head, t] for t in range(prompt)} for head in range(2)]
    rows = [{t: np.pad(p, (0, steps)) for t, p in of.items()} for of in rows]
    kept = [list(range(prompt)) for _ in range(2)]
    if prompt > BUDGET:
        kept = [cut(kept[h], rows[h], k[:, h], weight) for h in range(2)]
    history = [[set(x) for x in kept]]
    for t in range(prompt, prompt + steps):
        kept = [[*x, t] for x in kept]
        p = probs_where(q[t : t + 1], k, seen_by([set(x) for x in kept], prompt + steps)).max(1)[:, 0]
        for h in range(2):
            rows[h][t] = p[h]
            if len(kept[h]) == BUDGET + BUFFER:
                kept[h] = cut(kept[h], rows[h], k[:, h], weight)
        history.append([set(x) for x in kept])
    return history


@pytest.mark.parametrize("prompt", [70, 36, 20], ids="prompt={}".format)
@pytest.mark.parametrize("weight", [0.1, 0.7], ids="importance={}".format)
def test_keeps_what_the_formulas_say_at_every_step(prompt, weight):
    steps = 40
    q, k, v = repeating(prompt, prompt + steps)
    expected = simulate(*(np.asarray(x[0], np.float64) for x in (q, k)), prompt, steps, weight)
    text = f"{TEXT},importance={weight}"
    cache = make(text, batch=1, num_kv_heads=2, max_len=prompt + steps, prompt_lens=[prompt])
    _, cache = prefill(cache, *(x[:, :prompt] for x in (q, k, v)))
    assert held(cache) == expected[0]
    cuts = 0
    for t in range(prompt, prompt + steps):
        out, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        keep = seen_by([head | {t} for head in expected[t - prompt]], prompt + steps)
        wanted = output(probs_where(q[0, t : t + 1], k[0], keep), v[0])
        chex.assert_trees_all_close(out[0], jnp.asarray(wanted, jnp.float32), atol=1e-5)
        cache = settle(cache)
        assert held(cache) == expected[t - prompt + 1]
        cuts += len(expected[t - prompt + 1][0]) < len(expected[t - prompt][0])
    assert cuts >= 2
    assert expected[-1][0] != expected[-1][1]  # heads decide alone


def test_memory_is_the_budget_and_the_buffer():
    cache = make(TEXT, batch=1, num_kv_heads=2, max_len=500, prompt_lens=[100])
    assert cache.spec.max_tokens == BUDGET + BUFFER
    assert cache.tiers[0].k.shape[2] == BUDGET - RECENT + BUFFER
    assert cache.tiers[0].stat.shape == (1, 2, BUDGET - RECENT + BUFFER, RECENT)
    assert cache.tiers[0].stat.dtype == jnp.float16
    assert cache.spec.drop == BUFFER


def test_copies_go_and_the_newest_of_them_stays():
    """Twenty tokens with one key among others that are all different: of the twenty only the last survives."""
    q, k, v = qkv(5, 1, 60)
    copies = np.arange(4, 44, 2)
    k = jnp.asarray(k).at[:, copies].set(k[:, 4:5] * 3)
    text = TEXT.replace("budget=30", "budget=41").replace("threshold=0.2", "threshold=0.5")
    cache = make(text, batch=1, num_kv_heads=2, max_len=80, prompt_lens=[60])
    _, cache = prefill(cache, q * 0, k, v)
    for head in held(cache):
        assert set(copies.tolist()) & head == {42}


@pytest.mark.slow
def test_quantised_tokens_go_by_the_unit():
    prompt, steps, budget, buffer = 120, 70, 80, 16
    q, k, v = qkv(6, 1, prompt + steps)
    text = f"r_kv:budget={budget},buffer={buffer},recent=5+int4"
    cache = make(text, batch=1, num_kv_heads=2, max_len=prompt + steps, prompt_lens=[prompt])
    block = cache.spec.block_size
    assert (cache.spec.drop, cache.tiers[0].unit) == (buffer, 8)
    _, cache = prefill(cache, *(x[:, :prompt] for x in (q, k, v)))
    sizes = []
    for t in range(prompt, prompt + steps):
        out, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        cache = settle(cache)
        assert bool(jnp.isfinite(out).all())
        sizes.append(len(held(cache)[0]))
        assert set(range(t - 4, t + 1)) <= held(cache)[0]
    assert budget - 2 * block <= min(sizes) < max(sizes) <= budget + buffer + block
    assert sorted({x - y for x, y in itertools.pairwise(sizes)})[-1] == buffer - 1


def test_defaults_are_the_papers():
    policy = make("r_kv", batch=1, num_kv_heads=2, max_len=4096).spec.policy
    assert (policy.weight, policy.num_queries, policy.kernel_size, policy.threshold) == (0.1, 8, 7, 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("r_kv:budget=8", r"budget=8 tokens must exceed num_sinks=0 \+ recent=8"),
        ("r_kv:buffer=0", "buffer=0 be at least 1"),
        ("r_kv:importance=1.5", r"weight=1.5 of importance must be in \[0, 1\]"),
        ("r_kv:kernel_size=4", "kernel_size=4 must be odd"),
        ("r_kv:recent=0", "num_queries=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=100, head_dim=64)
