"""Every family and every rope scaling against transformers: logits, keys and values, greedy choices."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.models.golden import ATOL, NAMES, PROMPT, forward, load


@pytest.mark.parametrize("name", NAMES)
def test_logits_without_a_cache(name):
    lm, golden = load(name)
    np.testing.assert_allclose(lm(golden["tokens"]), golden["logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", [name for name in NAMES if "short_logits" in load(name)[1]])
def test_logits_of_a_text_within_the_original_context(name):
    lm, golden = load(name)
    np.testing.assert_allclose(lm(golden["tokens"][:, :PROMPT]), golden["short_logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_that_reach_the_cache(name):
    lm, golden = load(name)
    tokens = golden["tokens"]
    plan = kvc.parse("full").plan(lm.config.layout, max_len=tokens.shape[1])
    caches = plan.init(batch=tokens.shape[0], dtype=jnp.float32)
    prompt = tuple(kvc.open_prompt(cache, tokens.shape[1]) for cache in caches)
    logits, prompt = forward(name)(jnp.asarray(tokens), prompt)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=ATOL)
    for i, layer in enumerate(prompt):
        for ours, theirs in ((layer.staged.k, golden[f"k{i}"]), (layer.staged.v, golden[f"v{i}"])):
            np.testing.assert_allclose(ours[:, :, -theirs.shape[2] :], theirs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_choices(name):
    """Each choice from a pass over the text so far, right padded: padding and `rope_len` must not show."""
    _, golden = load(name)
    greedy = golden["greedy"]
    lengths = np.arange(PROMPT, greedy.shape[1], dtype=np.int32)
    texts = np.where(np.arange(greedy.shape[1])[None] < lengths[:, None], greedy, 0)
    logits, _ = forward(name)(jnp.asarray(texts), None, jnp.asarray(lengths), logits="last")
    np.testing.assert_array_equal(np.argmax(logits, -1), greedy[0, PROMPT:])
