"""Faithfulness of StreamingLLM's positions inside the cache: keys stored before rotation, and the turned query."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import HEAD_DIM, attend, decode, prefill, qkv, settle

ROPE = kvc.Rotary(kvc.Constant(1e4 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM).astype(np.float32)))
BUDGET, SINKS = 24, 4


def empty(text, max_len, dtype=jnp.float32):
    layout = kvc.Layout(num_layers=1, num_kv_heads=2, head_dim=HEAD_DIM, ropes=(ROPE,))
    return kvc.parse(text).plan(layout, max_len=max_len).init(batch=1, dtype=dtype)[0]


@jax.jit
def rotated(x):
    """x [B, T, H, D] at text positions from 0 on."""
    pos = jnp.arange(x.shape[1])[None, None]
    return ROPE.apply(x.swapaxes(1, 2), pos).swapaxes(1, 2).astype(x.dtype)


def in_cache(q, k, v, t, extra=0):
    """The paper's way: the cached keys of query t [H, D], unrotated, each rotated to its index in the cache."""
    return attention_in_cache(q, k, v, t, [i for i in range(t + 1) if i < SINKS or i > t - (BUDGET + extra - SINKS)])


def attention_in_cache(q, k, v, t, kept):
    """Attention of query t to the tokens kept, rotated by their index among them: f64[B, H, D]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q[:, t], k[:, kept], v[:, kept]))
    index = np.arange(len(kept))
    group = q.shape[1] // k.shape[2]
    query, keys = turned(q, index[-1:]), np.repeat(turned(k, index[:, None]), group, 2)
    logits = np.einsum("bhd,bshd->bhs", query, keys) / np.sqrt(HEAD_DIM)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhs,bshd->bhd", probs / probs.sum(-1, keepdims=True), np.repeat(v, group, 2))


def turned(x, index):
    """Rotate the pairs (i, i + D / 2) of x [..., D] by index times each pair's frequency."""
    angle = index[..., None] * (1e4 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


# In bfloat16 keys are stored rounded after their rotation, to 2**-9 of their size each.
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)], ids=["f32", "bf16"])
@pytest.mark.parametrize("prompt", [60, 10], ids="prompt={}".format)
def test_both_ways_to_count_positions_in_the_cache_agree_at_every_step(prompt, dtype, atol):
    steps = 40
    q, k, v = qkv(prompt, 1, prompt + steps, dtype=dtype)
    cache = empty(f"streaming_llm:budget={BUDGET},positions=cache", prompt + steps, dtype)
    rq, rk = rotated(q), rotated(k)
    _, cache = prefill(cache, rq[:, :prompt], rk[:, :prompt], v[:, :prompt])
    for t in range(prompt, prompt + steps):
        out, cache = decode(cache, *(x[:, t : t + 1] for x in (rq, rk, v)))
        chex.assert_trees_all_close(out[:, 0], in_cache(q, k, v, t), atol=atol)


def test_chunks_on_top_of_a_cache_meet_the_sinks_at_its_end():
    """A chunk evicts nothing before it is read, so all of it counts from the same gap."""
    q, k, v = qkv(3, 1, 70)
    cache = empty(f"streaming_llm:budget={BUDGET},positions=cache", 70)
    rq, rk = rotated(q), rotated(k)
    _, cache = prefill(cache, rq[:, :60], rk[:, :60], v[:, :60])
    out, _ = attend(kvc.open_prompt(cache, 10, fresh=False), rq[:, 60:], rk[:, 60:], v[:, 60:])
    for i, t in enumerate(range(60, 70)):
        chex.assert_trees_all_close(out[:, i], in_cache(q, k, v, t, extra=i + 1), atol=2e-5)


def test_positions_in_the_cache_compose_with_quantised_storage():
    """At 8 bits the outputs are near those of exact rows with the same tokens."""
    q, k, v = qkv(5, 1, 200)
    rq, rk, outs = rotated(q), rotated(k), {}
    for positions in ("cache", "text"):
        cache = empty(f"streaming_llm:budget=100,positions={positions}+int8", 200)
        _, cache = prefill(cache, *(x[:, :180] for x in (rq, rk, v)))
        for t in range(180, 200):
            out, cache = decode(cache, *(x[:, t : t + 1] for x in (rq, rk, v)))
            if (t - 179) % cache.spec.block_size == 0:
                cache = settle(cache)
        outs[positions] = out
        evicted = int(cache.settled[0]) - cache.tiers[0].capacity
    kept = [i for i in range(200) if i < SINKS or i >= SINKS + evicted]
    expected = attention_in_cache(q, k, v, 199, kept)[:, None]
    error = {name: float(jnp.abs(out - expected).max()) for name, out in outs.items()}
    assert error["cache"] < 0.03 < error["text"]


def test_a_stream_far_beyond_the_window_stays_finite_and_constant():
    q, k, v = qkv(6, 1, 16)
    cache = empty(f"streaming_llm:budget={BUDGET},positions=cache", 10**6)
    step = jax.jit(lambda cache, *x: kvc.decode(cache, *x))  # a count of its own
    for _ in range(8):
        for t in range(16):
            out, cache = step(cache, *(x[:, t : t + 1] for x in (q, k, v)))
    assert bool(jnp.isfinite(out).all())
    assert step._cache_size() == 1


def test_models_without_rotation_are_refused():
    with pytest.raises(ValueError, match="positions=cache needs a model whose keys are rotated"):
        kvc.parse("streaming_llm:positions=cache").spec(max_len=100, head_dim=64)
    with pytest.raises(ValueError, match="positions='index' must be 'text' or 'cache'"):
        kvc.parse("streaming_llm:positions=index").spec(max_len=100, head_dim=64)
