"""Homomorphic decode attention: its pieces, and every case on every backend that can run or be interpreted here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.homomorphic_decode import code_sums, homomorphic_decode, sums_dtype
from pallas_kernels.homomorphic_decode.cases import CASES, Case
from pallas_kernels.homomorphic_decode.partitions import to_int8
from pallas_kernels.quantized_decode import quantized_decode
from pallas_kernels.quantized_decode.cases import channel, token
from tests.kernels.backends import backends, results
from tests.kernels.test_quantized_decode import assert_same_attention


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends("homomorphic_decode"))
def test_a_backend_equals_the_reference(backend, name):
    got, want = results(homomorphic_decode, CASES[name], backend)
    # A probability at a tie may round the other way: 1/255 of its partition's largest.
    assert_same_attention(got, want, 1e-3)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_eight_bits_of_q_and_p_are_close_to_exact(implementation):
    (q, k, v, k_sums, v_sums, *rest), options = Case(token(4), channel(4)).arguments()
    got = homomorphic_decode(q, k, v, k_sums, v_sums, *rest, **options, implementation=implementation)
    want = quantized_decode(q, k, v, *rest, **options, implementation="reference")
    assert_same_attention(got, want, 2e-2)
    assert not np.allclose(got[0], want[0], rtol=1e-5, atol=1e-5)  # they are rounded


def test_the_stored_sums_are_used():
    (q, k, v, k_sums, v_sums, *rest), options = Case(token(2), channel(2)).arguments()
    right, wrong_k, wrong_v = (
        homomorphic_decode(q, k, v, *sums, *rest, **options, implementation="blocked")
        for sums in ((k_sums, v_sums), (k_sums + 1, v_sums), (k_sums, v_sums + 1))
    )
    assert not np.allclose(right[1], wrong_k[1])
    assert not np.allclose(right[0], wrong_v[0])


@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(2, 64, "uint8"), (2, 128, "int16"), (4, 16, "uint8"), (8, 128, "int16")]
)
def test_sums_fit_their_dtype(bits, group, dtype):
    fmt = channel(bits, group)
    assert sums_dtype(fmt) == dtype
    enc = jax.tree.map(jnp.zeros_like, Case(token(2, 16), fmt, head_dim=16).arguments()[0][2])
    enc = enc._replace(codes=~enc.codes)  # every code the largest
    np.testing.assert_array_equal(code_sums(enc, fmt), (2**bits - 1) * group)


def test_partitions_round_to_the_nearest():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4, 64)), jnp.float32)
    codes, scale, offset = to_int8(x.at[0].set(3.0).at[1, :, :5].set(0.0))
    back = codes * scale + offset
    assert float((jnp.abs(back - x) - scale / 2)[2:].max()) < 1e-5
    np.testing.assert_array_equal(back[0], 3.0)
    p = jnp.abs(x).at[..., :5].set(0.0)
    codes, scale, offset = to_int8(p)
    np.testing.assert_allclose((codes * scale + offset)[..., :5], 0.0, atol=1e-6)


def test_bad_calls_are_refused():
    (q, k, v, k_sums, v_sums, *rest), options = Case(token(2), channel(2)).arguments()
    with pytest.raises(ValueError, match="keys group per token and values per channel"):
        homomorphic_decode(q, k, v, k_sums, v_sums, *rest, **{**options, "k_format": channel(2)})
    with pytest.raises(ValueError, match="must be shaped as scales"):
        homomorphic_decode(q, k, v, k_sums, v_sums[:, :, :1], *rest, **options)
