"""The compiled decode loop: caches are updated in place, nothing is copied whole, nothing is compiled twice."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import kvcomp_jax as kvc
from models import decode_loop
from models.sampling import Sampling
from tests.models.golden import load
from tests.models.hlo import computations, copied, loops, reached

METHODS = ["full", "int8", "kivi:bits=4,group_size=16", "h2o:budget=2048", "streaming_llm:budget=2048"]
MAX_LEN, LENGTHS = 4096, (3000, 2000)
HLO_TYPES = {"float32": "f32", "float16": "f16", "uint32": "u32", "uint8": "u8", "int32": "s32"}


def start(method):
    lm, _ = load("llama")
    plan = kvc.parse(method).plan(lm.config.layout, max_len=MAX_LEN, prompt_len=max(LENGTHS))
    caches = plan.init(batch=2, dtype=jnp.float32, prompt_lens=list(LENGTHS))
    state = decode_loop.start(caches, jnp.zeros((2, lm.config.vocab_size)), 8)
    return (lm.model, plan.block_size, Sampling(), ()), lm.params, state


@functools.cache
def program(method):
    settings, params, state = start(method)
    return decode_loop.run.lower(settings, params, state, jnp.int32(0)).compile(), state


@pytest.mark.parametrize("method", METHODS)
def test_no_step_copies_a_cache_array(method):
    compiled, state = program(method)
    found = computations(compiled.as_text())
    (blocks,) = loops(found["ENTRY"])
    (step,) = loops(found[blocks])
    held = {(HLO_TYPES[x.dtype.name], x.shape) for x in jax.tree.leaves(state.caches) if x.size > 1000}
    assert held
    assert not copied(found, reached(found, step)) & held


def test_a_copy_in_a_loop_would_be_seen():
    def swap(pair):
        return pair[1], pair[0], pair[2] + 1

    text = jax.jit(lambda *x: lax.while_loop(lambda x: x[2] < 3, swap, x)).lower(
        jnp.zeros((64, 64)), jnp.ones((64, 64)), 0
    )
    found = computations(text.compile().as_text())
    (body,) = loops(found["ENTRY"])
    assert ("f32", (64, 64)) in copied(found, reached(found, body))


@pytest.mark.parametrize("method", METHODS)
def test_caches_are_donated(method):
    """All of the state's bytes come out where they went in; a few scalars a row may not."""
    compiled, state = program(method)
    memory = compiled.memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(state.caches))
    assert memory.output_size_in_bytes >= held
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000


def test_decoding_compiles_nothing():
    """Settling happens on the way: 200 steps cross the blocks of 64 and the prompt's ragged rows."""
    settings, params, state = start("kivi:bits=4,group_size=16,residual=16")
    before = decode_loop.run._cache_size()
    state = decode_loop.run(settings, params, state, jnp.int32(1))
    assert decode_loop.run._cache_size() == before + 1
    for until in (2, 8):
        state = decode_loop.run(settings, params, state, jnp.int32(until))
    assert decode_loop.run._cache_size() == before + 1
    assert int(state.step) == 8
