"""Ladders whose rungs have shares: every token settles once, on one rung."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.cache import window_pos
from kvcomp_jax.tiers import tier_pos
from kvcomp_jax.types import pytree
from tests.laws.parts import HEAD_DIM, HEADS, PROBING, decode_many, prefill, qkv

LENGTHS = [60, 0, 33]
STEPS = 50


def ladder(policy, *, capacity=120, sliding_window=None, codec=None):
    """Three exact rungs that keep 8, 2 and 6 of 16 tokens."""
    codec = codec or kvc.Identity()
    rungs = tuple(kvc.Rung(codec, codec, capacity, share=share) for share in (0.5, 0.25, 1.0))
    return kvc.LayerSpec(rungs=rungs, policy=policy, window=5, block_size=16, sliding_window=sliding_window)


def run(spec, heads=(4, 2)):
    """Prompts of LENGTHS, then STEPS more tokens: what attention gave, what it should give without loss, the cache."""
    q, k, v = qkv(3, len(LENGTHS), max(LENGTHS) + STEPS, heads)
    cache = kvc.init(spec, batch=len(LENGTHS), num_kv_heads=heads[1], head_dim=HEAD_DIM, dtype=jnp.float32)
    lengths = jnp.array(LENGTHS)
    _, cache = prefill(cache, q[:, : max(LENGTHS)], k[:, : max(LENGTHS)], v[:, : max(LENGTHS)], lengths)
    at = (lengths[:, None] + jnp.arange(STEPS)[None])[..., None, None]
    out, cache = decode_many(cache, *(jnp.take_along_axis(x, at, 1) for x in (q, k, v)))
    whole = kvc.causal_attention(q, k, v, sliding_window=spec.sliding_window)
    return out, jnp.take_along_axis(whole, at, 1), cache


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("policy", [kvc.HeavyHitter(), *PROBING], ids=repr)
def test_exact_rungs_lose_nothing(policy, heads):
    spec = ladder(policy)
    assert spec.steps == (8, 2, 6)
    out, whole, cache = run(spec, heads)
    chex.assert_trees_all_close(out, whole, atol=1e-5)
    np.testing.assert_array_equal(kvc.live_tokens(cache), np.array(LENGTHS) + STEPS)
    for tier, step in zip(cache.tiers, spec.steps, strict=True):
        assert tier.pos is None
        np.testing.assert_array_equal(tier.entered, cache.settled // 16 * step)


@pytest.mark.parametrize("window", [24, 512])
def test_sliding_windows_remember_positions(window):
    out, whole, cache = run(ladder(kvc.Saliency(), sliding_window=window))
    chex.assert_trees_all_close(out, whole, atol=1e-5)
    assert_each_position_once(cache)


@pytree
class PositionsMatter(kvc.Identity):
    uses_pos = True

    def bind(self, dtype):
        return PositionsMatter(dtype=jnp.dtype(dtype).name)


def test_codecs_that_look_at_positions_get_them():
    cache = run(ladder(kvc.Saliency(), codec=PositionsMatter()))[2]
    assert_each_position_once(cache)
    wrapped = kvc.ChannelScaled(inner=PositionsMatter())
    assert wrapped.uses_pos


def assert_each_position_once(cache):
    heads = cache.window.k.shape[:2]
    every = [np.broadcast_to(window_pos(cache), (*heads, cache.spec.window_slots))]
    every += [np.asarray(tier_pos(tier, 0)) for tier in cache.tiers]
    for row, length in enumerate(cache.length):
        for head in range(heads[1]):
            held = np.concatenate([pos[row, head] for pos in every])
            np.testing.assert_array_equal(np.sort(held[held >= 0]), np.arange(length))


def test_full_rungs_forget_their_own_oldest():
    out, _, cache = run(ladder(kvc.Saliency(), capacity=24, sliding_window=512))
    assert bool(jnp.isfinite(out).all())
    for tier, step in zip(cache.tiers, cache.spec.steps, strict=True):
        live = np.asarray(tier.pos[1, 0]) >= 0  # a row without a prompt: two blocks settled
        assert live.sum() == min(24, 2 * step)
    big, small, last = (np.asarray(tier.pos[0, 0]) for tier in cache.tiers)  # three blocks of a prompt and three more
    np.testing.assert_array_equal(np.bincount(big // 16), [0, 0, 0, 8, 8, 8])
    assert (small >= 48).sum() == 6
    assert (small[small >= 0] < 48).sum() == 6
    assert (last >= 48).sum() == 18


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": kvc.Recency()}, "need a policy that ranks tokens, Recency"),
        ({"rungs": (kvc.Rung(kvc.Identity(), kvc.Identity(), 16, share=0.5),)}, "share=0.5 of the last rung must be 1"),
        ({"block_size": 1}, "share=1.0 keeps 0 tokens|share=0.5 keeps 0 tokens"),
    ],
)
def test_impossible_shares_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(ladder(kvc.Saliency()), **changes)


def test_shares_must_be_whole_units():
    codec = kvc.Affine(bits=2, axis="token")
    with pytest.raises(ValueError, match=r"share=0\.5 keeps 8 tokens of block_size=16 on a rung"):
        ladder(kvc.Saliency(), codec=codec)
    with pytest.raises(ValueError, match=r"share=1.5 of a rung must be in \(0, 1\]"):
        kvc.Rung(codec, codec, 16, share=1.5)
