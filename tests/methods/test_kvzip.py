"""Faithfulness of KVzip: scores are those of repeating the prompt, and nothing else of the prompt changes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from models.activations import activations
from models.generate import prefill as prefill_model
from tests.laws.parts import make, prefill, qkv
from tests.methods.brute import held, probs_where
from tests.methods.votes import allotted
from tests.models import golden

SINKS = 4


def read(lm, rows, text, later=8):
    lengths = [len(row) for row in rows]
    plan = kvc.parse(text).plan(lm.config.layout, max_len=max(lengths) + later, prompt_len=max(lengths))
    logits, caches, *_ = prefill_model(lm, rows, plan.init(batch=len(rows), dtype=lm.dtype, prompt_lens=lengths))
    return plan, logits, caches


def draw(lm, *lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(0, lm.config.vocab_size, n).tolist() for n in lengths]


def repeated(lm, ids, chunk):
    """Of each layer the greatest attention [K, T] that tokens receive while chunks of them are repeated after all."""
    tops = [np.zeros((lm.config.num_kv_heads, len(ids))) for _ in range(lm.config.num_layers)]
    for start in range(0, len(ids), chunk):
        text = np.array([*ids, *ids[start : start + chunk]])
        pos = np.arange(len(text))[None, None]
        for i, layer in enumerate(activations(lm, text)):
            q, k = (np.asarray(layer.rope.apply(x.swapaxes(1, 2), pos)).swapaxes(1, 2)[0] for x in (layer.q, layer.k))
            probs = probs_where(q * np.sqrt(q.shape[-1]), k, np.tri(len(text), dtype=bool)[None])
            tops[i] = np.maximum(tops[i], probs[:, :, len(ids) :, : len(ids)].max((1, 2)))
    return tops


@pytest.mark.parametrize("chunk", [2048, pytest.param(32, marks=pytest.mark.slow)], ids="chunk={}".format)
@pytest.mark.parametrize(
    "safeguard", ["0.3", *(pytest.param(x, marks=pytest.mark.slow) for x in ("0.0", "none"))], ids="safeguard={}".format
)
def test_keeps_what_the_model_needs_to_repeat_the_prompt(safeguard, chunk):
    lm, _ = golden.load("llama")
    (ids,) = draw(lm, 60)
    _, _, caches = read(lm, [ids], f"kvzip:budget=24,safeguard={safeguard},chunk={chunk}")
    for cache, top in zip(caches, repeated(lm, ids, chunk), strict=True):
        least = 1.0 if safeguard == "none" else float(safeguard)
        best = allotted(top[:, SINKS:], 24 - SINKS, least)
        assert held(cache) == [{t + SINKS for t in head} | set(range(SINKS)) for head in best]


def test_reading_the_prompt_gives_what_the_full_cache_gives():
    lm, _ = golden.load("llama")
    rows = draw(lm, 60, 33)
    _, logits, caches = read(lm, rows, "kvzip:budget=0.5")
    _, expected, full = read(lm, rows, "full")
    chex.assert_trees_all_close(logits, expected, atol=2e-4)
    for cache, whole in zip(caches, full, strict=True):
        np.testing.assert_array_equal(cache.length, whole.length)
        np.testing.assert_array_equal(kvc.live_tokens(cache), [30, 16])


@pytest.mark.slow
def test_rows_keep_what_each_keeps_alone():
    lm, _ = golden.load("llama")
    rows = draw(lm, 60, 33, 7)
    _, _, together = read(lm, rows, "kvzip:budget=0.75,chunk=32")
    for row, ids in enumerate(rows):
        _, _, alone = read(lm, [ids], "kvzip:budget=0.75,chunk=32")
        assert [held(cache, row) for cache in together] == [held(cache) for cache in alone]


def test_budgets_beyond_the_prompt_lose_nothing():
    lm, _ = golden.load("llama")
    rows = draw(lm, 40)
    _, _, caches = read(lm, rows, "kvzip:budget=100")
    assert all(held(cache) == [set(range(40))] * 2 for cache in caches)


def test_bytes_are_those_of_the_tokens_kept():
    lm, _ = golden.load("llama")
    rows = draw(lm, 60, 33)
    plan, _, caches = read(lm, rows, "kvzip:budget=0.5")
    assert kvc.forecast(plan, [60, 33], lm.dtype) == kvc.nbytes(caches)
    assert caches[0].tiers[0].k.shape[:3] == (2, 1, 2 * (30 - SINKS + 8))


def test_it_is_refused_where_nobody_rehearses_or_there_is_no_room():
    cache = make("kvzip:budget=20", batch=1, num_kv_heads=2, max_len=64, prompt_lens=[60])
    with pytest.raises(TypeError, match="ranks by a rehearsal of the prompt"):
        prefill(cache, *qkv(0, 1, 60))
    lm, _ = golden.load("llama")
    longest = lm.config.max_positions
    with pytest.raises(ValueError, match=f"exceed the model's {longest} positions; take a shorter chunk"):
        read(lm, draw(lm, longest - 30), "kvzip:budget=20")


def test_scores_can_be_given_from_outside():
    q, k, v = qkv(0, 1, 40)
    prompt = kvc.open_prompt(
        make("kvzip:budget=14,safeguard=none", batch=1, num_kv_heads=2, max_len=48, prompt_lens=[40]), 40, num_heads=4
    )
    attend, close = jax.jit(kvc.attend), jax.jit(kvc.close_prompt)
    stat = jnp.asarray(np.random.default_rng(0).random((1, 2, 40)), jnp.float32)
    closed = close(attend(prompt, q, k, v)[1], stat=stat)
    for head, kept in enumerate(held(closed)):
        best = np.argsort(-np.asarray(stat[0, head, SINKS:]))[:10] + SINKS
        assert kept == set(best.tolist()) | set(range(SINKS))
    turn = kvc.open_prompt(closed, 5, fresh=False, num_heads=4)
    after = close(attend(turn, q[:, :5], k[:, :5], v[:, :5])[1])  # what follows is kept without rank
    assert held(after) == [head | set(range(40, 45)) for head in held(closed)]
