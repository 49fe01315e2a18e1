"""Decode attention over low-rank coefficients: every case on every backend that can run or be interpreted here."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.low_rank_decode import low_rank_decode
from pallas_kernels.low_rank_decode.cases import CASES, Case
from tests.kernels.backends import backends, results
from tests.kernels.test_quantized_decode import assert_same_attention


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends("low_rank_decode"))
def test_a_backend_equals_the_reference(backend, name):
    got, want = results(low_rank_decode, CASES[name], backend)
    assert_same_attention(got, want, 2e-2 if CASES[name].dtype == "bfloat16" or backend == "hopper" else 2e-4)


def test_coefficients_give_what_their_rows_would():
    (q, k, v, length, _, _), options = Case(k_rank=16, v_rank=32).arguments()
    rng = np.random.default_rng(1)
    k_basis, v_basis = (jnp.asarray(rng.standard_normal((r, 64)), jnp.float32) for r in (16, 32))
    queries = q @ jnp.linalg.pinv(k_basis).T  # [B, K, R, 64]: any queries whose projection is q
    acc, top, total = low_rank_decode(queries @ k_basis.T, k, v, length, **options)
    acc_full, top_full, total_full = low_rank_decode(queries, k @ k_basis, v @ v_basis, length, **options)
    assert_same_attention((acc @ v_basis, top, total), (acc_full, top_full, total_full), 1e-4)


def test_bad_calls_are_refused():
    (q, k, v, length, _, _), options = Case().arguments()
    with pytest.raises(ValueError, match="needs keys of its rank"):
        low_rank_decode(q[..., :32], k, v, length, **options)
    with pytest.raises(ValueError, match="multiples of 16"):
        low_rank_decode(q, k, v[..., :24], length, **options)
    with pytest.raises(ValueError, match="k_format must be given just if"):
        low_rank_decode(q, k, v, length, k_format=CASES["quantized-4"].k_format)
    with pytest.raises(ValueError, match="pos and q_pos come together"):
        low_rank_decode(q, k, v, length, sliding_window=3)
