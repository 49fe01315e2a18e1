"""Attention by the definition, in numpy and float64, and where a cache's tokens stand."""

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
    heads = cache.window.k.shape[1]
    tiers = (tier_positions(t, cache.spec.policy.num_sinks, heads) for t in cache.tiers)
    every = [
        np.broadcast_to(part, (part.shape[0], heads, part.shape[-1]))[row]
        for part in (window_pos(cache), sink_pos(cache), *tiers)
    ]
    positions = [np.concatenate([part[h] for part in every]) for h in range(heads)]
    assert all(len(set(p[p >= 0])) == (p >= 0).sum() for p in positions)  # no token twice
    return [set(p[p >= 0].tolist()) for p in positions]


def tier_positions(tier, num_sinks, heads):
    """Positions [B, K or 1, S] that each KV head sees on a rung, also where heads share slots or some have none."""
    pos = np.asarray(tier_pos(tier, num_sinks))
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
