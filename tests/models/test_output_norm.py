"""How much values can change the output, as the model tells a policy that weighs by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
import models
from models.layers import Linear
from pallas_kernels.hadamard import hadamard_blocks
from tests.models import golden

METHOD = "critical_kv:budget=10"


def variants():
    lm, _ = golden.load("llama")
    four = models.IntegerFormat(weight_bits=4)
    return {"floats": lm, "heads rotated": models.rotate(lm), "4 bits": models.to_integers(lm, four)}


def read(lm, tokens, chunk):
    """The open prompts of all layers after `tokens` i32[B, T] in chunks."""
    plan = kvc.parse(METHOD).plan(lm.config.layout, max_len=40, prompt_len=tokens.shape[1])
    caches = plan.init(batch=len(tokens), dtype=jnp.float32)
    prompts = tuple(kvc.open_prompt(c, tokens.shape[1], num_heads=lm.config.num_heads) for c in caches)
    step = jax.jit(functools.partial(lm.model.apply, logits="none"))
    for start in range(0, tokens.shape[1], chunk):
        _, prompts = step(lm.params, tokens[:, start : start + chunk], prompts)
    return prompts


def brute(lm, layer, v):
    """One head's value at a time through the output projection: v [B, K, S, D] -> [B, K, S]."""
    c, group = lm.config, lm.config.num_heads // lm.config.num_kv_heads
    params = {"params": lm.params["params"][f"layers_{layer}"]["attn"]["o_proj"]}
    project = Linear(c.model_dim, c.o_bias, c.integers)
    norms = []
    for head in range(c.num_heads):
        alone = jnp.zeros((v.shape[0], v.shape[2], c.num_heads, c.head_dim)).at[:, :, head].set(v[:, head // group])
        if c.rotate_heads:
            alone = hadamard_blocks(alone.swapaxes(-1, -2)).swapaxes(-1, -2)
        flat = alone.reshape(*alone.shape[:2], -1)
        made = project.apply(params, flat) - project.apply(params, jnp.zeros_like(flat))  # without the bias
        norms.append(jnp.abs(made).sum(-1))
    return jnp.stack(norms, 1).reshape(v.shape[0], -1, group, v.shape[2]).mean(2)


@pytest.mark.parametrize("variant", ["floats", "heads rotated", "4 bits"])
def test_norms_are_those_of_the_output_projection(variant):
    lm = variants()[variant]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, lm.config.vocab_size, (2, 20)), jnp.int32)
    for layer, prompt in enumerate(read(lm, tokens, 20)):
        np.testing.assert_allclose(prompt.output_norm, brute(lm, layer, prompt.staged.v), rtol=2e-4)


def test_chunks_change_nothing():
    lm, _ = golden.load("llama")
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, lm.config.vocab_size, (2, 20)), jnp.int32)
    for whole, chunked in zip(read(lm, tokens, 20), read(lm, tokens, 5), strict=True):
        np.testing.assert_allclose(chunked.output_norm, whole.output_norm, rtol=1e-4)


def test_only_first_prompts_of_policies_that_weigh_outputs_want_it():
    lm, _ = golden.load("llama")
    want = {}
    for text in ("full", "critical_kv:budget=10", "critical_kv:budget=10,projected=false"):
        cache = kvc.parse(text).plan(lm.config.layout, max_len=40, prompt_len=20).init(batch=1, dtype=jnp.float32)[0]
        first, later = (kvc.open_prompt(cache, 20, fresh=fresh, num_heads=4) for fresh in (True, False))
        want[text] = [kvc.wants_output_norm(x) for x in (first, later, cache)]
    assert want == {
        "full": [False] * 3,
        "critical_kv:budget=10": [True, False, False],
        "critical_kv:budget=10,projected=false": [False] * 3,
    }


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be .* with H a multiple of 2 KV heads"):
        kvc.output_norm(jnp.zeros((1, 4, 2, 8)), jnp.zeros((16, 24)))


def test_norms_left_out_are_asked_for():
    lm, _ = golden.load("llama")
    c = lm.config
    cache = kvc.parse(METHOD).plan(c.layout, max_len=40, prompt_len=20).init(batch=1, dtype=jnp.float32)[0]
    q, k = jnp.ones((1, 20, c.num_heads, c.head_dim)), jnp.ones((1, 20, c.num_kv_heads, c.head_dim))
    with pytest.raises(ValueError, match=r"output_norm=None must be .*ValueWeighted weighs values.*projected=False"):
        kvc.prefill(cache, q, k, k)
    norm = jax.eval_shape(kvc.output_norm, k, lm.params["params"]["layers_0"]["attn"]["o_proj"]["weight"])
    assert norm.shape == (1, 20, c.num_kv_heads)
