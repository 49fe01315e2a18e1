"""Rotations folded into weights change no logit, and are where they are said to be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.layers import MLP
from models.names import flatten
from pallas_kernels.hadamard import hadamard_matrix
from tests.models.golden import load

PARTS = ("residual", "values", "heads", "ffn")
FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "mistral_window"]  # GQA; tied, with biases; norms of q and k; fused maps
TOKENS = 24


def switched(*on):
    return {part: part in on for part in PARTS}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_stay_the_same(name):
    lm, golden = load(name)
    tokens = golden["tokens"][:, :TOKENS]
    rotated = models.rotate(lm)
    assert rotated.config.rotate_heads
    assert rotated.config.rotate_ffn
    np.testing.assert_allclose(rotated(tokens), lm(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_keeps_logits_and_changes_weights(part):
    lm, golden = load("qwen2")
    rotated = models.rotate(lm, **switched(part))
    tokens = golden["tokens"][:, :TOKENS]
    np.testing.assert_allclose(rotated(tokens), lm(tokens), rtol=0, atol=1e-4)
    before, after = (flatten(m.params["params"]) for m in (lm, rotated))
    changed = {path.split(".")[-2] for path in before if not np.array_equal(before[path], after[path])}
    maps = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    norms = {"input_norm", "mlp_norm", "final_norm"}
    assert (
        changed
        == {
            "residual": maps | norms | {"embed_tokens"},
            "values": {"v_proj", "o_proj"},
            "heads": {"o_proj"},
            "ffn": {"down_proj"},
        }[part]
    )
    assert (rotated.config.rotate_heads, rotated.config.rotate_ffn) == (part == "heads", part == "ffn")


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gains_are_folded_and_embeddings_only_rotated(name):
    """Row by row, an embedding keeps its length and its angles to all others: nothing is subtracted."""
    lm, _ = load(name)
    before, after = (flatten(m.params["params"]) for m in (lm, models.rotate(lm)))
    for path, leaf in after.items():
        if path.split(".")[-2] in ("input_norm", "mlp_norm", "final_norm"):
            np.testing.assert_array_equal(leaf, 1)
    old, new = (np.asarray(p["embed_tokens.weight"], np.float64) for p in (before, after))
    np.testing.assert_allclose(new @ new.T, old @ old.T, atol=1e-5)
    assert np.abs(new - old).max() > 0.1 * np.abs(old).max()
    assert "lm_head.weight" in after
    assert not models.rotate(lm).config.tie_embeddings
    assert lm.config.tie_embeddings == ("lm_head.weight" not in before)  # the model given is as it was


def test_values_come_rotated_out_of_their_map():
    lm, _ = load("qwen2")
    rotated = models.rotate(lm, **switched("values"))
    for kind in ("weight", "bias"):
        old, new = (np.asarray(m.params["params"]["layers_1"]["attn"]["v_proj"][kind]) for m in (lm, rotated))
        heads = old.reshape(2, 16, -1)
        want = np.einsum("ij,kjm->kim", hadamard_matrix(16) / 4, heads).reshape(old.shape)
        np.testing.assert_allclose(new, want, atol=1e-6)


def test_a_rotated_hidden_layer_has_no_outlier():
    """A channel of the MLP that is a hundred times too loud, read a hundred times too softly, in 4 bits."""
    lm, _ = load("llama")
    layer = lm.params["params"]["layers_0"]
    loud = jnp.ones(128).at[7].set(100.0)
    mlp = {
        "gate_proj": layer["mlp"]["gate_proj"],
        "up_proj": {"weight": layer["mlp"]["up_proj"]["weight"] * loud[:, None]},
        "down_proj": {"weight": layer["mlp"]["down_proj"]["weight"] / loud[None]},
    }
    noisy = dataclasses.replace(lm, params={"params": {**lm.params["params"], "layers_0": {**layer, "mlp": mlp}}})
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 64)), jnp.float32)

    def output(m):
        return MLP(m.config).apply({"params": m.params["params"]["layers_0"]["mlp"]}, x)

    four = models.IntegerFormat(activation_bits=4)
    rotated = models.rotate(noisy, **switched("ffn"))
    np.testing.assert_allclose(output(rotated), output(noisy), atol=1e-4 * float(jnp.abs(output(noisy)).max()))
    errors = [float(jnp.square(output(models.to_integers(m, four)) - output(m)).mean()) for m in (noisy, rotated)]
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize(("name", "words"), [("gpt2", "norm='layer' of gpt2"), ("gemma2", "post_norms=True")])
def test_residual_streams_that_cannot_be_rotated_are_refused_and_the_rest_is_not(name, words):
    lm, golden = load(name)
    with pytest.raises(ValueError, match=f"{words}.*pass residual=False"):
        models.rotate(lm)
    rotated = models.rotate(lm, residual=False)
    tokens = golden["tokens"][:, :TOKENS]
    np.testing.assert_allclose(rotated(tokens), lm(tokens), rtol=0, atol=1e-4)


def test_a_part_is_rotated_once():
    lm, _ = load("llama")
    with pytest.raises(ValueError, match="rotate a model once"):
        models.rotate(models.rotate(lm, **switched("heads")))
    packed = models.to_integers(lm, models.IntegerFormat(weight_bits=4))
    with pytest.raises(ValueError, match="rotate first, then quantise"):
        models.rotate(packed)


@pytest.mark.slow
def test_a_rotated_model_generates_the_same_text_and_survives_saving(tmp_path):
    lm, golden = load("qwen3")
    rotated = models.rotate(lm)
    prompts = [golden["tokens"][0, :20].tolist()]
    rotated.save(tmp_path / "rotated")
    again = models.load(tmp_path / "rotated", dtype="float32")
    assert again.config == rotated.config
    jax.tree.map(np.testing.assert_array_equal, again.params, rotated.params)
    assert again.generate(prompts, max_new_tokens=8).tokens == lm.generate(prompts, max_new_tokens=8).tokens
