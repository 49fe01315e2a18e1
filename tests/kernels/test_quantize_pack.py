"""Quantisation to packed codes: every case bit for bit on every backend that can run or be interpreted here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import kvcomp_jax as kvc
from pallas_kernels.formats import Format
from pallas_kernels.quantize_pack import quantize_pack
from pallas_kernels.quantize_pack.cases import CASES
from tests.kernels.backends import backends, results
from tests.laws.parts import make, qkv


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends("quantize_pack"))
def test_a_backend_equals_the_reference(backend, name):
    got, want = results(quantize_pack, CASES[name], backend)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", CASES)
def test_jitting_changes_no_bit(name):
    (x, fmt), options = CASES[name].arguments()
    eager = quantize_pack(x, fmt, **options)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(quantize_pack, static_argnums=1)(x, fmt), eager)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="group_size=48 must divide 64"):
        quantize_pack(np.zeros((1, 1, 64, 64)), Format(4, "token", 48))
    with pytest.raises(ValueError, match="a multiple of 8 tokens at 4 bits"):
        quantize_pack(np.zeros((1, 1, 63, 64)), Format(4, "token", 32))


@pytest.mark.parametrize(
    "fmt", [Format(4, "token", 32), Format(2, "channel", 32), Format(8, "token", 64, symmetric=True)]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_debugging_finds_what_is_not_finite(fmt, bad):
    x = np.ones((1, 2, 64, 64), np.float32)
    x[0, 1, 40, 3] = bad
    quantise = checkify.checkify(jax.jit(lambda x: quantize_pack(x, fmt)))
    with pytest.raises(checkify.JaxRuntimeError, match="quantize_pack got values that are not finite"):
        checkify.check_error(quantise(x)[0])
    checkify.check_error(quantise(np.ones_like(x))[0])


def test_debugging_finds_it_in_a_prompt():
    cache = make("int4", batch=1, num_kv_heads=2, max_len=256)
    q, k, v = qkv(0, 1, 64)
    prefill = checkify.checkify(jax.jit(kvc.prefill))
    checkify.check_error(prefill(cache, q, k, v)[0])
    with pytest.raises(checkify.JaxRuntimeError, match="not finite"):
        checkify.check_error(prefill(cache, q, jnp.asarray(k).at[0, 3, 1, 7].set(jnp.nan), v)[0])
