"""What tests of recalling methods share: one layer's cache, filled, and which tokens a query's output is over."""

import jax.numpy as jnp
import numpy as np

import kvcomp_jax as kvc
from tests.laws.parts import HEAD_DIM, decode, make, prefill, qkv, settle
from tests.methods.brute import output, probs_where


def filled(text, prompt, steps=0, *, heads=(4, 2), lengths=None, seed=0, dtype=jnp.float32):
    """q, k, v and the cache after a prompt."""
    batch = len(lengths) if lengths else 1
    q, k, v = qkv(seed, batch, prompt + steps, heads, dtype=dtype)
    sizes = {"num_heads": heads[0], "num_kv_heads": heads[1], "max_len": prompt + steps}
    cache = make(text, batch=batch, prompt_lens=lengths, dtype=dtype, **sizes)
    length = jnp.array(lengths or [prompt])
    return (q, k, v), prefill(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt], length)[1]


def stream(cache, q, k, v):
    """Outputs of single steps that settle after each, and the cache after every step."""
    outs, caches = [], []
    for t in range(q.shape[1]):
        out, cache = decode(cache, q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1])
        cache = settle(cache)
        outs.append(np.asarray(out[:, 0]))
        caches.append(cache)
    return np.stack(outs, 1), caches


def attention_over(q, k, v, keep):
    """Output [H, D] of one query q [H, D] that sees tokens keep [H, S] of k, v [S, K, D]."""
    groups = q.shape[0] // k.shape[1]
    outs = []
    for head in range(q.shape[0]):
        mine = slice(head // groups, head // groups + 1)
        probs = probs_where(q[None, head : head + 1], k[:, mine], keep[head][None, None])
        outs.append(output(probs, v[:, mine])[0, 0])
    return np.stack(outs)


def whole(q, k, v):
    return np.asarray(kvc.causal_attention(q, k, v))


__all__ = ["HEAD_DIM", "attention_over", "filled", "stream", "whole"]
