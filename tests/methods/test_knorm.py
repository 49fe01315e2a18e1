"""Faithfulness of key norms: the tokens that another implementation keeps."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from models.generate import prefill as prefill_model
from tests.laws.parts import make, prefill, qkv
from tests.methods.brute import held
from tests.models import golden

GOLDEN = Path(__file__).parents[1] / "golden" / "methods"


@pytest.mark.parametrize("ratio", ["0.5", "0.75"])
def test_keeps_keys_as_short_as_those_that_kvpress_keeps(ratio):
    """Of two norms that tie to within rounding either is right, so norms are compared."""
    lm, _ = golden.load("llama")
    with np.load(GOLDEN / f"knorm_{ratio}.npz") as arrays:
        kept = dict(arrays)
    tokens = kept["tokens"][0].tolist()

    def cached(method):
        plan = kvc.parse(method).plan(lm.config.layout, max_len=256, prompt_len=256)
        return prefill_model(lm, [tokens], plan.init(batch=1, dtype=lm.dtype, prompt_lens=[256]))[1]

    whole = cached("full:block_size=1")
    for layer, cache in enumerate(cached(f"knorm:budget={1 - float(ratio)}")):
        norms = np.linalg.norm(np.asarray(whole[layer].tiers[0].k, np.float32)[0], axis=-1)
        for head, (ours, theirs) in enumerate(zip(held(cache), kept[f"layer{layer}"], strict=True)):
            assert len(ours) == len(theirs)
            assert len(ours ^ set(theirs.tolist())) <= 2
            ours, theirs = (np.sort(norms[head][list(x)]) for x in (ours, theirs.tolist()))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_each_head_and_row_keeps_its_own_and_all_that_follows():
    lengths = [90, 41]
    q, k, v = qkv(0, 2, 96)
    cache = make("knorm:budget=30,num_sinks=2", batch=2, num_kv_heads=2, max_len=120, prompt_lens=lengths)
    _, cache = prefill(cache, q[:, :90], k[:, :90], v[:, :90], jnp.array(lengths))
    for row, length in enumerate(lengths):
        norms = np.linalg.norm(np.asarray(k)[row, 2:length], axis=-1)
        best = [{0, 1} | set((np.argsort(norms[:, head])[:28] + 2).tolist()) for head in range(2)]
        assert held(cache, row) == best
        assert best[0] != best[1]
