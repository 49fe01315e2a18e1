"""H2O and StreamingLLM against brute force."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.plan import CachePlan
from models.generate import prefill as prefill_model
from tests.laws.parts import HEAD_DIM, make, prefill, qkv
from tests.methods.brute import held
from tests.models import golden

GOLDEN = Path(__file__).parents[1] / "golden" / "methods"


def probs_of(q, k, keep):
    """Softmax of one query [H, D] over kept keys [T, D] of one KV head, zero elsewhere."""
    logits = q @ k.T / np.sqrt(HEAD_DIM)
    logits = np.where(keep, logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_h2o_keeps_what_brute_force_keeps():
    prompt, steps, budget = 50, 25, 20
    q, k, v = qkv(0, 1, prompt + steps, heads=(2, 1))
    cache = make("h2o:budget=20", batch=1, num_kv_heads=1, max_len=prompt + steps)
    _, cache = prefill(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    qn, kn, vn = np.asarray(q[0], np.float64), np.asarray(k[0, :, 0], np.float64), np.asarray(v[0, :, 0], np.float64)
    mass, keep = np.zeros(prompt + steps), np.zeros(prompt + steps, bool)
    for t in range(prompt):
        keep[t] = True
        mass += probs_of(qn[t], kn, keep).sum(0)
    evict(keep, mass, prompt, budget)
    step, settle = jax.jit(kvc.decode), jax.jit(kvc.settle)
    for t in range(prompt, prompt + steps):
        keep[t] = True
        p = probs_of(qn[t], kn, keep)
        mass += p.sum(0)
        out, cache = step(cache, q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1])
        chex.assert_trees_all_close(out[0, 0], jnp.asarray(p @ vn, jnp.float32), atol=1e-5)
        cache = settle(cache)
        evict(keep, mass, t + 1, budget)
        tier = cache.tiers[0]
        heavy = np.asarray(tier.pos[0, 0])
        assert set(heavy.tolist()) == set(np.flatnonzero(keep[: t + 1 - budget // 2]).tolist())
        np.testing.assert_allclose(tier.stat[0, 0], mass[heavy], rtol=1e-4)


@pytest.mark.parametrize("ratio", ["0.5", "0.75"])
def test_mass_over_the_queries_that_saw_a_key_keeps_what_kvpress_keeps(ratio):
    """Its ObservedAttention ranks a prompt as H2O does, but divides by how many queries saw a key."""
    lm, _ = golden.load("llama")
    with np.load(GOLDEN / f"observed_attention_{ratio}.npz") as arrays:
        kept = dict(arrays)
    rung = kvc.Rung(kvc.Identity(), kvc.Identity(), kept["layer0"].shape[1])
    spec = kvc.LayerSpec(rungs=(rung,), policy=kvc.Saliency(recent=1.0, random=0.0, divide_by="queries"), block_size=1)
    plan = CachePlan((spec,) * lm.config.layout.num_layers, lm.config.layout)
    _, caches, *_ = prefill_model(lm, [kept["tokens"][0].tolist()], plan.init(batch=1, dtype=lm.dtype))
    for layer, cache in enumerate(caches):
        assert held(cache) == [set(head.tolist()) for head in kept[f"layer{layer}"]]


def evict(keep, mass, length, budget):
    """Keep the last half and the heaviest of the rest."""
    recent = budget // 2
    old = np.flatnonzero(keep[: length - recent])
    for t in sorted(old, key=lambda t: mass[t])[: max(len(old) - (budget - recent), 0)]:
        keep[t] = False


def test_streaming_llm_sees_sinks_and_the_most_recent():
    prompt, steps, budget, sinks = 60, 30, 24, 4
    q, k, v = qkv(1, 1, prompt + steps, heads=(2, 1))
    cache = make("streaming_llm:budget=24", batch=1, num_kv_heads=1, max_len=prompt + steps)
    _, cache = prefill(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    allocated = kvc.nbytes(cache).allocated
    qn, kn, vn = (np.asarray(x, np.float64) for x in (q[0], k[0, :, 0], v[0, :, 0]))
    step = jax.jit(kvc.decode)
    for t in range(prompt, prompt + steps):
        keep = np.zeros(prompt + steps, bool)
        keep[:sinks] = True
        keep[t + 1 - (budget - sinks) : t + 1] = True
        out, cache = step(cache, q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1])
        chex.assert_trees_all_close(out[0, 0], jnp.asarray(probs_of(qn[t], kn, keep) @ vn, jnp.float32), atol=1e-5)
    assert kvc.nbytes(cache).allocated == allocated
