"""Decode attention over codes of non-uniform levels: backends agree, and the definition is what it says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codebook_decode import codebook_decode
from pallas_kernels.codebook_decode.cases import CASES, PLAIN, Case, keys, values
from pallas_kernels.packing import unpack
from tests.kernels.backends import backends, results
from tests.kernels.test_quantized_decode import assert_same_attention


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends("codebook_decode"))
def test_a_backend_equals_the_reference(backend, name):
    got, want = results(codebook_decode, CASES[name], backend)
    assert_same_attention(got, want, 2e-2 if CASES[name].dtype == "bfloat16" else 2e-4)


def rows_of(x, heads, pos):
    """Rows [B, K, S, D] in float64, token by token and channel by channel as `CodebookRows` says."""
    x = jax.tree.map(np.asarray, x)
    rows = x.levels.astype(np.float64)[np.asarray(unpack(jnp.asarray(x.codes), x.bits))]
    if x.scale is not None:
        rows = rows * x.scale[..., None]
    if x.zero_point is not None:
        rows = rows + x.zero_point[..., None]
    if x.outliers is not None:
        more = np.zeros(rows.shape)
        np.put_along_axis(more, x.outlier_channels.astype(int), x.outliers.astype(np.float64), -1)
        rows = rows + more
    if rows.shape[1] != heads:
        rows = np.stack(np.split(rows[:, 0], heads, -1), 1)
    if x.channel_scale is not None:
        rows = rows * x.channel_scale[:, :, None] + x.channel_zero_point[:, :, None]
    if x.rope is not None:
        frequency, factor = x.rope.astype(np.float64)
        turned = np.exp(1j * np.asarray(pos, np.float64)[..., None] * frequency) * factor
        n = len(frequency)
        pairs = (rows[..., :n] + 1j * rows[..., n : 2 * n]) * turned
        rows = np.concatenate([pairs.real, pairs.imag, rows[..., 2 * n :]], -1)
    return rows


@pytest.mark.parametrize("name", ["bits-3", "heads-apart", "partial-rope", "scale-a-token", "head_dim-80"])
def test_the_reference_is_softmax_attention_to_the_rows(name):
    (q, k, v, length, pos, q_pos), options = CASES[name].arguments()
    acc, _, total = codebook_decode(q, k, v, length, pos, q_pos, **options, implementation="reference")
    k_rows, v_rows = rows_of(k, q.shape[1], pos), rows_of(v, q.shape[1], None)
    logits = np.einsum("bkrd,bksd->bkrs", np.asarray(q, np.float64), k_rows)
    logits[~np.broadcast_to(np.arange(k_rows.shape[2]) < np.asarray(length)[:, None, None, None], logits.shape)] = -1e9
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.einsum("bkrs,bksd->bkrd", p / p.sum(-1, keepdims=True), v_rows)
    np.testing.assert_allclose(acc / total[..., None], want, atol=2e-3)


@pytest.mark.parametrize("name", ["bits-3", "heads-apart", "levels-alone", "holes-per-head", "bfloat16-query"])
def test_shapes_are_those_of_the_arguments(name):
    chex.assert_trees_all_equal_shapes_and_dtypes(CASES[name].shapes(), CASES[name].arguments()[0])


def test_bad_calls_are_refused():
    (q, k, v, length, pos, q_pos), options = Case(keys(), values()).arguments()
    with pytest.raises(ValueError, match=r"codes of keys .* do not fit q"):
        codebook_decode(q[..., :32], k, v, length, pos, q_pos, **options)
    with pytest.raises(ValueError, match="256 slots of keys are not 128 of values"):
        codebook_decode(q, k, v.with_stored(v.cut(0, 128)), length, pos, q_pos, **options)
    with pytest.raises(ValueError, match="need pos"):
        codebook_decode(q, k, v, length, **options)
    with pytest.raises(ValueError, match="values do not rotate"):
        codebook_decode(q, k, v._replace(rope=k.rope), length, pos, q_pos, **options)
    with pytest.raises(ValueError, match="keys have 2 levels"):
        codebook_decode(q, k._replace(levels=k.levels[:2]), v, length, pos, q_pos, **options)
    with pytest.raises(ValueError, match="pos and q_pos come together"):
        codebook_decode(*Case(PLAIN, PLAIN, positions=None).arguments()[0][:4], sliding_window=3)
