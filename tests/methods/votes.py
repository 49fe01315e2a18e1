"""Votes of a prompt's last queries, as their papers define them, in numpy."""

import numpy as np

from tests.methods.brute import causal_probs


def votes(q, k, *, window, kernel_size, pooling):
    """Pooled votes [K, T - window] of one row's q [T, H, D] for k [T, K, D], averaged over each group."""
    tokens = len(k)
    summed = causal_probs(q, k)[:, :, tokens - window :, : tokens - window].sum(2)  # [K, G, S]
    half = kernel_size // 2
    padded = np.pad(summed, ((0, 0), (0, 0), (half, half)))
    near = np.stack([padded[..., i : i + summed.shape[-1]] for i in range(kernel_size)])
    return (near.max(0) if pooling == "max" else near.mean(0)).mean(1)


def chosen(scores, candidates, num):
    """The `num` candidates of the highest scores [K, S], a set a head; lower index first among equals."""
    kept = []
    for row in scores:
        order = sorted(candidates, key=lambda t: (-row[t], t))
        kept.append(set(order[:num]))
    return kept


def allotted(score, mean, safeguard):
    """Sets of tokens, a mean of `mean` a head: the best of each up to the safeguard, then the best of all [K, S]."""
    heads, tokens = score.shape
    score = score.copy()
    for row in score:
        row[np.argsort(-row, kind="stable")[: int(mean * safeguard)]] = np.inf
    order = np.argsort(-score.ravel(), kind="stable")[: heads * mean]
    return [set((order[order // tokens == h] % tokens).tolist()) for h in range(heads)]
