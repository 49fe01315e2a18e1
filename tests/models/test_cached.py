"""A prompt in chunks and then single tokens, through caches, gives what one pass over the text gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.models.golden import ATOL, forward, load

close = jax.jit(lambda prompts: tuple(map(kvc.close_prompt, prompts)))  # op by op, each would compile alone
settle = jax.jit(lambda caches: tuple(map(kvc.settle, caches)))
LENGTHS, CHUNK, STEPS = (21, 13), 8, 12  # windows of 8 and 16 tokens, contexts of 32, are passed while decoding
NAMES = ["gemma2", "gemma3", "gpt2", "llama_dynamic", "mistral_window", "phi3_longrope", "qwen2_window"]


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_decode_steps_equal_one_pass(name):
    """Rows have different lengths and the second one sits out every other step."""
    lm, golden = load(name)
    run, tokens, lengths = forward(name), golden["tokens"], np.array(LENGTHS, np.int32)
    final = jnp.asarray(lengths + np.array([STEPS, STEPS // 2], np.int32))
    expected, _ = run(jnp.asarray(tokens), None, None, rope_len=final)

    plan = kvc.parse("full").plan(lm.config.layout, max_len=tokens.shape[1])
    caches = plan.init(batch=len(lengths), dtype=jnp.float32)
    prompt = tuple(kvc.open_prompt(cache, 3 * CHUNK) for cache in caches)
    for start in range(0, 3 * CHUNK, CHUNK):
        here = np.clip(lengths - start, 0, CHUNK)
        chunk = jnp.asarray(tokens[:, start : start + CHUNK])
        logits, prompt = run(chunk, prompt, jnp.asarray(here), rope_len=final)
        for row, count in enumerate(here):
            wanted = expected[row, start : start + count]
            np.testing.assert_allclose(logits[row, :count], wanted, rtol=0, atol=ATOL)

    caches = close(prompt)
    np.testing.assert_array_equal(kvc.positions(caches[0], 1)[:, 0], lengths)
    every = min(cache.spec.block_size for cache in caches)
    for step in range(STEPS):
        if step % every == 0:
            caches = settle(caches)
        here = np.array([1, step % 2], np.int32)
        chosen = jnp.asarray(tokens[np.arange(2), lengths][:, None])
        logits, caches = run(chosen, caches, jnp.asarray(here), logits="last", rope_len=final)
        for row in np.flatnonzero(here):
            np.testing.assert_allclose(logits[row], expected[row, lengths[row]], rtol=0, atol=ATOL)
        lengths = lengths + here


def test_last_and_none_agree_with_all():
    _, golden = load("llama_linear")
    run, tokens, length = forward("llama_linear"), jnp.asarray(golden["tokens"]), jnp.array([48, 17], jnp.int32)
    every, _ = run(tokens, None, length)
    last, held = run(tokens, None, length, logits="last")
    assert held is None
    np.testing.assert_allclose(last, np.stack([every[0, 47], every[1, 16]]), rtol=0, atol=1e-5)
    assert run(tokens, None, length, logits="none") == (None, None)
    with pytest.raises(ValueError, match="logits='lst' must be 'all', 'last' or 'none'"):
        run(tokens, None, length, logits="lst")
    with pytest.raises(ValueError, match="got 0 caches for a model of 3 layers"):
        run(tokens, ())


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_longrope"])
def test_rows_of_different_lengths_keep_their_own_frequencies(name):
    """The longer row is past the original context, the shorter is not."""
    _, golden = load(name)
    run, tokens = forward(name), jnp.asarray(golden["tokens"])
    logits, _ = run(tokens, None, jnp.array([48, 24], jnp.int32))
    np.testing.assert_allclose(logits[0], golden["logits"][0], rtol=0, atol=ATOL)
    np.testing.assert_allclose(logits[1, :24], golden["short_logits"][1], rtol=0, atol=ATOL)
    assert np.abs(golden["logits"][1, :24] - golden["short_logits"][1]).max() > 100 * ATOL
