"""Whether a method's cache is read by a fused operation, and whether that is what `dot` and `mix` are."""

import chex
import jax.numpy as jnp
import numpy as np

import kvcomp_jax as kvc
from kvcomp_jax.tiers import attend_by_blocks, attend_tier
from tests.laws.parts import decode_many, make, prefill, qkv


def assert_read_is_fused(text, operation):
    """After two prompts of different lengths and some steps; returns what is said of the rung, and the cache."""
    q, k, v = qkv(20, 2, 136, heads=(6, 2))
    cache = make(text, batch=2, num_kv_heads=2, max_len=160)
    _, cache = prefill(cache, q[:, :100], k[:, :100], v[:, :100], jnp.array([100, 70]))
    (rung,) = kvc.kernels_in_use(cache, num_heads=6)
    assert rung.operation == operation
    _, cache = decode_many(cache, q[:, 100:135], k[:, 100:135], v[:, 100:135])
    assert len(set(np.asarray(cache.tiers[0].entered).tolist())) == 2  # rows of different lengths
    queries, sinks = kvc.read.make_queries(cache, q[:, 135:], None, None, None), cache.spec.policy.num_sinks
    fused, plain = (attend(queries, cache.tiers[0], sinks) for attend in (attend_tier, attend_by_blocks))
    chex.assert_trees_all_close(kvc.finalize(fused), kvc.finalize(plain), atol=1e-5)
    chex.assert_trees_all_close(kvc.lse(fused), kvc.lse(plain), atol=1e-5)
    return rung, cache
