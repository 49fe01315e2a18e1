"""Quantisation to packed codes: every case bit for bit on every backend that can run or be interpreted here."""

import jax
import numpy as np
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format
from pallas_kernels.quantize_pack import quantize_pack
from pallas_kernels.quantize_pack.cases import CASES
from tests.kernels.backends import backends


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends("quantize_pack"))
def test_a_backend_equals_the_reference(backend, name):
    (x, fmt), _ = CASES[name].arguments()
    want = jax.jit(lambda x: quantize_pack(x, fmt, implementation="reference"))(x)
    try:
        got = jax.jit(lambda x: quantize_pack(x, fmt, implementation=backend, interpret=True))(x)
    except Unsupported as reason:
        pytest.skip(str(reason))
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
