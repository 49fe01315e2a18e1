"""Faithfulness of SnapKV: what votes keep, in numpy and by another implementation; what happens afterwards."""

from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from models.generate import prefill as prefill_model
from tests.laws.parts import HEAD_DIM, decode_many, make, prefill, qkv
from tests.methods.brute import held, output, probs_where, seen_by
from tests.methods.votes import chosen, votes
from tests.models import golden

GOLDEN = Path(__file__).parents[1] / "golden" / "methods"


@pytest.mark.parametrize(
    ("kernel_size", "pooling"), [(7, "max"), (5, "avg"), (1, "max")], ids=["max-7", "avg-5", "none"]
)
@pytest.mark.parametrize("sinks", [0, 3])
def test_keeps_what_numpy_votes_for(kernel_size, pooling, sinks):
    lengths, budget, window = [90, 61], 40, 8
    q, k, v = qkv(0, 2, 90, heads=(6, 2))
    text = f"snapkv:budget={budget},window={window},kernel_size={kernel_size},pooling={pooling},num_sinks={sinks}"
    cache = make(text, batch=2, num_kv_heads=2, max_len=100, prompt_lens=lengths)
    _, cache = prefill(cache, q, k, v, jnp.array(lengths))
    for row, n in enumerate(lengths):
        score = votes(q[row, :n], k[row, :n], window=window, kernel_size=kernel_size, pooling=pooling)
        best = chosen(score, range(sinks, n - window), budget - window - sinks)
        always = set(range(sinks)) | set(range(n - window, n))
        assert held(cache, row) == [head | always for head in best]
        assert best[0] != best[1]  # each head for itself


@pytest.mark.parametrize("ratio", ["0.5", "0.75"])
def test_keeps_the_tokens_that_kvpress_keeps(ratio):
    lm, _ = golden.load("llama")
    with np.load(GOLDEN / f"snapkv_w16_k5_{ratio}.npz") as arrays:
        kept = dict(arrays)
    tokens = kept["tokens"][0].tolist()
    text = f"snapkv:budget={1 - float(ratio)},window=16,kernel_size=5,pooling=avg"
    plan = kvc.parse(text).plan(lm.config.layout, max_len=260, prompt_len=256)
    _, caches, *_ = prefill_model(lm, [tokens], plan.init(batch=1, dtype=lm.dtype, prompt_lens=[256]))
    for layer, cache in enumerate(caches):
        assert held(cache) == [set(head.tolist()) for head in kept[f"layer{layer}"]]


@pytest.mark.parametrize("ratio", ["0.5", "0.75"])
def test_streams_keep_the_tokens_that_kvpress_keeps(ratio):
    with np.load(GOLDEN / f"streaming_llm_sink4_{ratio}.npz") as kept:
        cache = make(
            f"streaming_llm:budget={1 - float(ratio)}", batch=1, num_kv_heads=2, max_len=260, prompt_lens=[256]
        )
        _, cache = prefill(cache, *qkv(0, 1, 256))
        assert held(cache) == [set(head.tolist()) for head in kept["layer0"]]


def test_all_that_follows_the_prompt_is_kept_and_nothing_of_it_is_dropped():
    prompt, steps = 70, 45
    q, k, v = qkv(1, 1, prompt + steps)
    cache = make("snapkv:budget=30,window=8,block_size=4", batch=1, num_kv_heads=2, max_len=115, prompt_lens=[prompt])
    _, cache = prefill(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    first = held(cache)
    out, cache = decode_many(cache, q[:, prompt:], k[:, prompt:], v[:, prompt:])
    assert held(cache) == [head | set(range(prompt, prompt + steps)) for head in first]
    keep = seen_by(first, prompt + steps) | (np.arange(prompt + steps) >= prompt)[None, None]
    keep = keep & np.tri(prompt + steps, dtype=bool)[None, prompt:]
    expected = output(probs_where(q[0, prompt:], k[0], keep), v[0])
    chex.assert_trees_all_close(out[0], jnp.asarray(expected, jnp.float32), atol=1e-5)


def test_buffers_have_the_budget_and_the_answer_and_no_more():
    layout = kvc.Layout(num_layers=1, num_kv_heads=2, head_dim=HEAD_DIM)
    plan = kvc.parse("snapkv:budget=0.25,window=32").plan(layout, max_len=1064, prompt_len=1024)
    cache = plan.init(batch=1, dtype=jnp.bfloat16)[0]
    assert cache.tiers[0].k.shape[2] == 256 - 32 + 40
    assert cache.window.k.shape[2] == 32 + 31
    assert cache.tiers[0].stat is None  # votes are forgotten
    assert cache.window.stat is None
    tokens = 2 * (264 + 63)
    assert kvc.nbytes(cache).allocated == tokens * 2 * HEAD_DIM * 2 + 2 * 264 * 4 + 5 * 4


def test_votes_that_are_all_equal_keep_the_first():
    q, k, v = qkv(2, 1, 60)
    cache = make("snapkv:budget=20,window=8,kernel_size=1", batch=1, num_kv_heads=2, max_len=64, prompt_lens=[60])
    _, cache = prefill(cache, q, jnp.zeros_like(k), v)
    assert held(cache) == [set(range(12)) | set(range(52, 60))] * 2


@pytest.mark.parametrize("length", [1, 5, 8, 9])
def test_prompts_no_longer_than_the_window(length):
    q, k, v = qkv(3, 1, 30)
    cache = make("snapkv:budget=20,window=8", batch=1, num_kv_heads=2, max_len=30, prompt_lens=[length])
    _, cache = prefill(cache, q[:, :9], k[:, :9], v[:, :9], jnp.array([length]))
    assert held(cache) == [set(range(length))] * 2
    out, _ = decode_many(cache, *(x[:, length : length + 12] for x in (q, k, v)))
    whole = kvc.causal_attention(*(x[:, : length + 12] for x in (q, k, v)))
    chex.assert_trees_all_close(out, whole[:, length:], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snapkv:budget=32", r"budget=32 tokens must exceed num_sinks=0 \+ window=32"),
        ("snapkv:kernel_size=4", "kernel_size=4 must be odd"),
        ("snapkv:pooling=mean", "pooling='mean' must be 'avg' or 'max'"),
        ("snapkv:window=0", "num_queries=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=100, head_dim=64)


def test_short_rows_shrink_the_window_where_the_budget_is_a_fraction():
    lengths = [100, 12, 1]
    q, k, v = qkv(4, 3, 110)
    cache = make("snapkv:budget=0.5,window=32", batch=3, num_kv_heads=2, max_len=110, prompt_lens=lengths)
    _, cache = prefill(cache, *(x[:, :100] for x in (q, k, v)), jnp.array(lengths))
    np.testing.assert_array_equal(kvc.live_tokens(cache), [50, 6, 1])
