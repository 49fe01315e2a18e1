"""A sketch of the residual makes products right on average, and costs variance."""

import functools

import numpy as np
import pytest

from kvcomp_jax.codecs import Affine, Codebook, Sketched
from kvcomp_jax.types import Constant
from tests.laws.parts import decoded, encode, normal

DIM = 64
ONE_BIT = Codebook(levels=Constant(np.array([-1, 1], np.float32) * np.sqrt(2 / np.pi).astype(np.float32)))


@functools.cache
def errors(codec, seeds):
    """What products of queries with their own keys get wrong, in units of |q| |k|: f64[seeds, tokens]."""
    k = normal(0, 32, DIM)
    exact = np.square(np.asarray(k)).sum(-1)
    found = []
    for seed in range(seeds):
        coded = Sketched(inner=codec, seed=seed, metadata_dtype="float32") if seeds > 1 else codec
        logits = np.asarray(coded.dot(k, encode(coded, k, None), None))
        found.append((np.diagonal(logits) - exact) / exact)
    return np.array(found, np.float64)


@pytest.mark.slow
def test_levels_alone_shrink_products_and_the_sketch_undoes_it():
    plain = errors(ONE_BIT, 1).mean()
    assert plain == pytest.approx(2 / np.pi - 1, abs=0.03)  # the bias of one bit
    sketched = errors(ONE_BIT, 60)
    spread = sketched.std() / np.sqrt(sketched.size)
    assert abs(sketched.mean()) < 4 * spread < 0.03


@pytest.mark.slow
def test_variance_is_the_published_bound():
    k = normal(0, 32, DIM)
    residual = np.asarray(k - decoded(ONE_BIT, encode(ONE_BIT, k, None), None))
    bound = np.pi / (2 * DIM) * np.square(residual).sum(-1) / np.square(np.asarray(k)).sum(-1)
    found = errors(ONE_BIT, 60).var(0)
    assert 0.3 * bound.mean() < found.mean() < 1.1 * bound.mean()


def test_bytes_are_one_bit_a_value_and_a_norm():
    inner = Affine(bits=2, axis="token")
    for dtype, bits in (("float16", 16), ("float32", 32)):
        codec = Sketched(inner=inner, metadata_dtype=dtype)
        assert codec.nbits(64, DIM) - inner.nbits(64, DIM) == 64 * (DIM + bits)
        assert codec.unit == 32


def test_blocks_that_words_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="block_size=16 must be a multiple of 32"):
        Sketched(inner=ONE_BIT).check(DIM, 16)
