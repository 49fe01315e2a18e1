"""Law 5, how many tokens a cache may hold: budgets of methods that evict, windows of sliding-window layers."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import (
    ARKVALE,
    CLUSTER_KV,
    FORMS,
    HEAD_DIM,
    PYRAMID,
    QUEST,
    decode,
    decode_many,
    make,
    prefill,
    qkv,
)
from tests.laws.test_cache import LENGTHS, STEPS, assert_no_duplicates, exact, lengths_for, run

BUDGETED = [
    ("streaming_llm:budget=40", 40),
    ("h2o:budget=40", 40),
    ("h2o:budget=40,num_sinks=3", 40),
    ("h2o:budget=0.5", 35),
    ("tova:budget=40,num_sinks=2", 40),
    ("snapstream:budget=40", 40),
    ("r_kv:budget=40,buffer=8", 40),
]


@pytest.mark.parametrize(("text", "budget"), BUDGETED)
def test_evicting_caches_hold_exactly_their_budget(text, budget):
    q, k, v = qkv(7, 2, 110)
    _, _, cache, after_prompt = run(text, q, k, v, [70, 70])
    np.testing.assert_array_equal(kvc.live_tokens(after_prompt), budget)
    np.testing.assert_array_equal(kvc.live_tokens(cache), budget)
    assert_no_duplicates(cache)


SELECTING = [
    *(text for text, _ in BUDGETED if "0." not in text),
    "snapkv:budget=40,window=8",
    "knorm:budget=40",
    "expected_attention:budget=40",
    "ada_kv:budget=40,window=8",
    "critical_kv:budget=40,by=snapkv,window=8,projected=false",
    "scissorhands:budget=40,history=20",
    QUEST,
    ARKVALE,
    CLUSTER_KV,
]
FEW = ("h2o:budget=40", "snapkv:budget=40,window=8")  # the others are slow tests
EACH = [text if text in FEW else pytest.param(text, marks=pytest.mark.slow) for text in SELECTING]


@pytest.mark.parametrize("text", EACH)
def test_scores_that_are_all_equal_choose_as_many_tokens(text):
    """Keys of zeros: every query attends to all alike."""
    q, k, v = qkv(9, 2, 110)
    out, decoded, cache, after_prompt = run(text, q, jnp.zeros_like(k), v, [70, 70])
    assert np.isfinite(out).all()
    assert np.isfinite(decoded).all()
    assert_no_duplicates(cache)
    for budget in [budget for name, budget in BUDGETED if name == text]:
        np.testing.assert_array_equal(kvc.live_tokens(after_prompt), budget)
        np.testing.assert_array_equal(kvc.live_tokens(cache), budget)


@pytest.mark.parametrize("text", EACH)
def test_rows_without_a_prompt_hold_nothing_and_begin_with_their_first_token(text):
    q, k, v = qkv(10, 4, 71)
    cache = make(text, batch=4, num_kv_heads=2, max_len=110)
    _, cache = prefill(cache, q[:, :70], k[:, :70], v[:, :70], jnp.array([70, 0, 33, 0]))
    np.testing.assert_array_equal(kvc.live_tokens(cache)[[1, 3]], 0)
    assert (kvc.live_tokens(cache)[[0, 2]] > 0).all()
    out, cache = decode(cache, q[:, 70:], k[:, 70:], v[:, 70:])
    for row in (1, 3):
        chex.assert_trees_all_close(out[row, 0], jnp.repeat(v[row, 70], 2, 0), atol=1e-5)
    np.testing.assert_array_equal(kvc.live_tokens(cache)[[1, 3]], 1)


@pytest.mark.parametrize(
    "text", ["h2o:budget=90+int4", "h2o:budget=64,block_size=4", "streaming_llm:budget=100+kivi:bits=4"]
)
def test_block_wise_evicting_caches_never_exceed_their_budget(text):
    q, k, v = qkv(8, 1, 260)
    _, _, cache, after_prompt = run(text, q, k, v, [180], steps=80)
    budget = int(text.split("=")[1].split("+")[0].split(",")[0])
    slack = cache.spec.block_size
    for held in (after_prompt, cache):
        live = int(kvc.live_tokens(held)[0])
        assert budget - 3 * slack <= live <= budget + slack - 1
    assert_no_duplicates(cache)


@pytest.mark.parametrize("text", [*sorted(FORMS - {PYRAMID}), "full:block_size=64"])
@pytest.mark.parametrize("window", [16, 48])
def test_sliding_window_layers_never_exceed_their_window(text, window):
    q, k, v = qkv(12, 4, max(LENGTHS) + STEPS)
    lengths = lengths_for(text)
    _, decoded, cache, _ = run(text, q, k, v, lengths, window=window)
    ring = 4 * 2 * 2 * window * HEAD_DIM * 4  # batch, k and v, heads
    counters = 4 * 4 * (3 + 2 * len(cache.tiers))
    assert kvc.nbytes(cache).allocated <= ring + counters
    if text.startswith("full"):
        whole = exact(q, k, v, window)
        for row, n in enumerate(lengths):
            chex.assert_trees_all_close(decoded[row], whole[row, n : n + STEPS], atol=1e-5)


def test_long_compressed_sliding_windows_see_all_of_their_window():
    """A compressed ladder cut to the window holds every token that a query may see."""
    from kvcomp_jax.plan import localise

    spec = kvc.parse("kivi:bits=2,residual=32").spec(max_len=2000, head_dim=HEAD_DIM)
    local = localise(spec, 512, 2000, HEAD_DIM)
    assert len(local.rungs) == 2
    held = local.window + sum(r.capacity for r in local.rungs)
    assert held >= 512
    q, k, v = qkv(13, 1, 1500)
    sharp = kvc.LayerSpec(
        rungs=tuple(kvc.Rung(kvc.Identity(), kvc.Identity(), r.capacity) for r in local.rungs),
        block_size=local.block_size,
        sliding_window=512,
    )
    cache = kvc.init(sharp, batch=1, num_kv_heads=2, head_dim=HEAD_DIM, dtype=jnp.float32)
    _, cache = prefill(cache, q[:, :1400], k[:, :1400], v[:, :1400])
    out, _ = decode_many(cache, q[:, 1400:], k[:, 1400:], v[:, 1400:])
    chex.assert_trees_all_close(out, exact(q, k, v, 512)[:, 1400:], atol=1e-5)


@pytest.mark.parametrize(
    "text", ["snapkv:budget=0.5,window=8", "h2o:budget=0.5", "scissorhands:budget=0.5", "knorm:budget=0.5"]
)
def test_fractions_of_a_prompt_of_one_token_are_that_token(text):
    q, k, v = qkv(11, 2, 70)
    cache = make(text, batch=2, num_kv_heads=2, max_len=110, prompt_lens=[70, 1])
    out, cache = prefill(cache, q, k, v, jnp.array([70, 1]))
    assert kvc.live_tokens(cache)[1] == 1
    chex.assert_trees_all_close(out[1, 0], jnp.repeat(v[1, 0], 2, 0), atol=1e-5)


@pytest.mark.parametrize(
    "text", ["streaming_llm:budget=0.5", "tova:budget=0.5,num_sinks=2", "expected_attention:budget=0.5"]
)
def test_fractions_too_small_for_the_sinks_name_the_row(text):
    with pytest.raises(ValueError, match=r"a row with prompt_len=1: .*budget=1"):
        make(text, batch=2, num_kv_heads=2, max_len=110, prompt_lens=[70, 1])
