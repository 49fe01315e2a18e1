import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
import models
from experiments.protocol import compare_logits, cut_windows, judge, score_chunk, score_stream
from models.generate import prefill


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def test_windows_start_evenly_and_end_with_the_scored_tokens():
    windows = cut_windows(list(range(100)), context=20, score=5, windows=3)
    assert windows.shape == (3, 25)
    assert windows[:, 0].tolist() == [0, 33, 66]
    assert windows[2].tolist() == list(range(66, 91))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"context": 0, "score": 5, "windows": 1}, "context=0"),
        ({"context": 5, "score": 1, "windows": 1}, "score=1"),
        ({"context": 5, "score": 5, "windows": 0}, "windows=0"),
        ({"context": 90, "score": 11, "windows": 1}, "100 tokens"),
        ({"context": 40, "score": 20, "windows": 2}, "at least 120"),
    ],
)
def test_impossible_windows_are_named(sizes, named):
    with pytest.raises(ValueError, match=named):
        cut_windows(list(range(100)), **sizes)


def test_comparison_equals_numpy_in_float64():
    rng = np.random.default_rng(1)
    reference, logits = (rng.normal(0, 4, (7, 50)).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, 50, 7)
    nll, kl, top1 = compare_logits(jnp.asarray(reference), jnp.asarray(logits), jnp.asarray(targets))
    p, q = log_softmax(reference), log_softmax(logits)
    np.testing.assert_allclose(nll, -q[np.arange(7), targets].mean(), rtol=1e-5)
    np.testing.assert_allclose(kl, (np.exp(p) * (p - q)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(top1, (reference.argmax(-1) == logits.argmax(-1)).mean())


def test_comparison_survives_large_logits_and_is_zero_for_equal_ones():
    logits = jnp.asarray([[3e4, -3e4, 0.0], [1e-3, 2e-3, 0.0]])
    same = judge(logits, logits, np.array([0, 1]))
    assert same.kl == 0.0
    assert same.top1 == 1.0
    assert np.isfinite(same.nll)


@pytest.mark.parametrize("stream", [False, True], ids=["chunk", "stream"])
def test_scoring_on_a_full_cache_equals_no_cache(model_folder, stream):
    lm = models.load(model_folder)
    tokens = np.random.default_rng(2).integers(0, 199, 84).astype(np.int32)
    plan = kvc.parse("full:block_size=16").plan(lm.config.layout, max_len=84, prompt_len=60)
    _, caches, _, _ = prefill(lm, [tokens[:60].tolist()], plan.init(batch=1, dtype=lm.dtype, prompt_lens=[60]))
    rest = jnp.asarray(tokens[60:])
    if stream:
        logits = score_stream(lm.model, plan.block_size, lm.params, rest, caches)
    else:
        logits = score_chunk(lm.model, lm.params, rest, caches)
    assert logits.shape == (23, 199)  # predictions of tokens 61 … 83
    np.testing.assert_allclose(logits, lm(tokens[None])[0, 60:83], atol=2e-4)


@pytest.mark.parametrize(("budget", "evicts"), [(100, False), (16, True)])
def test_streaming_differs_from_a_chunk_only_by_what_it_evicts(model_folder, budget, evicts):
    lm = models.load(model_folder)
    tokens = np.random.default_rng(3).integers(0, 199, 84).astype(np.int32)
    plan = kvc.parse(f"streaming_llm:budget={budget}").plan(lm.config.layout, max_len=84, prompt_len=60)
    _, caches, _, _ = prefill(lm, [tokens[:60].tolist()], plan.init(batch=1, dtype=lm.dtype, prompt_lens=[60]))
    rest = jnp.asarray(tokens[60:])
    chunk = score_chunk(lm.model, lm.params, rest, caches)
    stream = score_stream(lm.model, plan.block_size, lm.params, rest, caches)
    assert (np.abs(np.asarray(chunk[-1] - stream[-1])).max() > 1e-2) == evicts
