"""Attention by the definition, in numpy and float64, and where a cache's tokens stand."""

import jax
import numpy as np

from kvcomp_jax.cache import sink_pos, window_pos
from kvcomp_jax.tiers import tier_pos


def causal_probs(q, k):
    """Probabilities [K, G, T, T] of one row's q [T, H, D] over k [T, K, D]."""
    return probs_where(q, k, np.tri(len(k), dtype=bool)[None])


def probs_where(q, k, keep):
    """Probabilities [K, G, T, S] of q [T, H, D] over those of k [S, K, D] that keep [K or 1, T, S] says."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
    logits = np.einsum("tkgd,skd->kgts", grouped, k) / np.sqrt(q.shape[-1])
    logits = np.where(keep[:, None], logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def output(probs, v):
    """Outputs [T, H, D] of probabilities [K, G, T, S] over v [S, K, D]."""
    out = np.einsum("kgts,skd->tkgd", probs, np.asarray(v, np.float64))
    return out.reshape(len(out), -1, v.shape[-1])


def held(cache, row=0):
    """The sets of text positions that each KV head of a row holds."""
    every = [part[row] for part in positions(cache)]
    by_head = [np.concatenate([part[h] for part in every]) for h in range(cache.window.k.shape[1])]
    assert all(len(set(p[p >= 0])) == (p >= 0).sum() for p in by_head)  # no token twice
    return [set(p[p >= 0].tolist()) for p in by_head]


def positions(cache):
    """Positions [B, K, S] that each KV head sees in the window, among the sinks, and on every rung."""
    heads = cache.window.k.shape[1]
    window, sinks, *tiers = map(np.asarray, _positions(cache))
    parts = (window, sinks, *(_of_head(tier, pos, heads) for tier, pos in zip(cache.tiers, tiers, strict=True)))
    return [np.broadcast_to(part, (len(part), heads, part.shape[-1])) for part in parts]


@jax.jit
def _positions(cache):
    num_sinks = cache.spec.policy.num_sinks
    return window_pos(cache), sink_pos(cache), *(tier_pos(tier, num_sinks) for tier in cache.tiers)


def _of_head(tier, pos, heads):
    """Positions [B, K or 1, S] of a rung, also where heads share slots or some have none."""
    if tier.head is not None:
        return np.where(np.asarray(tier.head) == np.arange(heads)[None, :, None], pos, -1)
    if tier.heads is None:
        return pos
    return np.where(np.isin(np.arange(heads), tier.heads)[None, :, None], pos, -1)


def seen_by(sets, num_tokens):
    """Sets of positions as a mask [K, 1, S]."""
    keep = np.zeros((len(sets), 1, num_tokens), bool)
    for head, positions in enumerate(sets):
        keep[head, 0, sorted(positions)] = True
    return keep
