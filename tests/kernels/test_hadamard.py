"""Hadamard rotation: the matrices, and every case on every backend that can run or be interpreted here."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hadamard as op
from pallas_kernels.hadamard.cases import CASES, Case
from pallas_kernels.hadamard.ties import codes_apart, same_rows
from pallas_kernels.quantize_pack import dequantize, quantize_pack
from tests.kernels.backends import backends, results

DIMS = [m * 2**n for m in (1, 12, 20, 28, 36, 44, 60, 76, 108, 124, 140, 312) for n in range(10) if m * 2**n <= 512]


@pytest.mark.parametrize("dim", DIMS)
def test_matrices_are_symmetric_and_orthogonal(dim):
    matrix = op.hadamard_matrix(dim).astype(int)
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(matrix @ matrix, dim * np.eye(dim))


@pytest.mark.parametrize(
    ("dim", "instead"),
    [(0, ""), (3, ", or 12 times one"), (6, ", or 12 times one"), (100, ", or 200 times one"), (11008, "")],
)
def test_other_orders_are_refused(dim, instead):
    with pytest.raises(ValueError, match=f"dim={dim} has no Hadamard matrix here: .* a power of 2{instead}."):
        op.hadamard(jnp.zeros((2, dim)))


@pytest.mark.parametrize(("dim", "order"), [(1, 1), (9, 1), (14, 2), (24, 24), (576, 576), (1376, 32), (4864, 4864)])
def test_rotation_in_blocks_of_the_largest_order(dim, order):
    assert op.largest_order(dim) == order
    x = np.random.default_rng(0).standard_normal((3, dim))
    want = x.reshape(3, -1, order) @ op.hadamard_matrix(order) * order**-0.5
    np.testing.assert_allclose(op.rotate_blocks_host(x), want.reshape(3, dim), atol=1e-11)
    np.testing.assert_allclose(op.hadamard_blocks(jnp.asarray(x, jnp.float32)), want.reshape(3, dim), atol=2e-5)


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128])
def test_a_rotation_undoes_itself_and_keeps_norms(dim):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, dim)), jnp.float32)
    y = op.hadamard(x)
    np.testing.assert_allclose(op.hadamard(y), x, atol=2e-6)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends("hadamard"))
def test_a_backend_equals_the_reference(backend, name):
    case = CASES[name]
    got, want = results(getattr(op, case.function), case, backend)
    if case.function == "rotate_quantize_pack":
        assert same_rows(got, want, case.fmt), codes_apart(got, want, case.fmt)
    else:
        tolerance = 1e-2 if case.dtype == "bfloat16" else 5e-6
        assert got.dtype == want.dtype
        np.testing.assert_allclose(
            got.astype(jnp.float32), want.astype(jnp.float32), atol=tolerance * float(jnp.abs(want).max())
        )


def test_rows_are_the_same_up_to_ties():
    case = CASES["quantized-4-token"]
    want = op.rotate_quantize_pack(*case.arguments()[0])

    def same(codes=want.codes, scale=want.scale):
        return same_rows(want._replace(codes=codes, scale=scale), want, case.fmt)

    place = 1, 2, 3, 4
    tied = jnp.where(want.codes[place] & 15, want.codes[place] - 1, want.codes[place] + 1)
    assert same()
    assert same(codes=want.codes.at[place].set(tied))
    assert not same(codes=want.codes.at[place].set(~want.codes[place]))
    assert not same(codes=want.codes.at[0, 0, 0].set(want.codes[0, 0, 0] ^ 1))
    assert not same(scale=want.scale.at[place[:3]].set(jnp.nan))
    assert not same(scale=want.scale.astype(jnp.float32))


def test_rotation_helps_rows_with_outlier_channels():
    (x, fmt), _ = Case(fmt=CASES["quantized-4-token"].fmt).arguments()
    rows = op.hadamard(dequantize(op.rotate_quantize_pack(x, fmt), fmt))
    rotated_error = jnp.square(rows - x).mean()
    plain_error = jnp.square(dequantize(quantize_pack(x, fmt), fmt) - x).mean()
    assert rotated_error < 0.8 * plain_error
