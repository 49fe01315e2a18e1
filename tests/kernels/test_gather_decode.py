"""Attention over selected pages: every case on every backend that can run or be interpreted here, and the selection."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gather_decode import gather_decode, page_top_k
from pallas_kernels.gather_decode.cases import CASES, Case
from pallas_kernels.low_rank_decode import low_rank_decode
from tests.kernels.backends import backends, results
from tests.kernels.test_quantized_decode import assert_same_attention


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends("gather_decode"))
def test_a_backend_equals_the_reference(backend, name):
    got, want = results(gather_decode, CASES[name], backend)
    assert_same_attention(got, want, 2e-2 if CASES[name].dtype == "bfloat16" or backend == "hopper" else 2e-4)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_all_pages_in_any_order_are_the_whole_cache(implementation):
    case = Case(num_pages=20, selected=20, filled=(20 * 32, 77), missing=0.0)
    (q, k, v, index, length), options = case.arguments()
    got = gather_decode(q, k, v, index, length, **options, implementation=implementation)
    k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (k, v))
    want = low_rank_decode(q, k, v, jnp.asarray(case.filled), implementation="reference")
    assert_same_attention(got, want, 1e-4)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_unselected_pages_are_not_read(implementation):
    (q, k, v, index, length), options = Case().arguments()
    chosen = (jnp.arange(16)[None, None, None] == index[..., None]).any(2)[..., None, None]  # [B, K, N, 1, 1]
    states = [
        gather_decode(q, jnp.where(chosen, k, x), jnp.where(chosen, v, x), index, length, **options,
                      implementation=implementation)
        for x in (0.0, 1e9)
    ]  # fmt: skip
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_best_pages_that_hold_something_are_selected():
    inf = float("inf")
    scores = jnp.array([[[0.0, 3.0, 2.0, 1.0], [5.0, -inf, inf, -2.0]]])
    length = jnp.array([[[1, 0, 32, 7]]])
    np.testing.assert_array_equal(page_top_k(scores, length, 4), [[[2, 3, 0, -1], [2, 0, 3, -1]]])
    np.testing.assert_array_equal(page_top_k(scores, length, 2), [[[2, 3], [2, 0]]])
    np.testing.assert_array_equal(page_top_k(scores, jnp.zeros_like(length), 2), jnp.full((1, 2, 2), -1))
    with pytest.raises(ValueError, match="num_pages=5 exceeds the 4 pages"):
        page_top_k(scores, length, 5)


def test_bad_calls_are_refused():
    (q, k, v, index, length), options = Case().arguments()
    with pytest.raises(ValueError, match=r"page_index .* must be \[B, K, n\]"):
        gather_decode(q, k, v, index[:, 0], length, **options)
    with pytest.raises(ValueError, match="does not fit 15 pages"):
        gather_decode(q, k, v, index, length[..., :15], **options)
    (q, k, v, index, length), options = CASES["quantized-4"].arguments()
    with pytest.raises(ValueError, match="pages of 16 slots cut the 32 slots that k encodes together"):
        gather_decode(q, k, v, index, jnp.repeat(length, 2, -1), **options)
