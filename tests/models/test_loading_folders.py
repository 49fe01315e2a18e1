"""Hugging Face folders and our own checkpoints: every way to store a model gives the same parameters."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.names import flatten
from tests.models.files import GOLDEN, cast, copy, read, write

FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
TOKENS = np.arange(1, 25, dtype=np.int32)[None]


def same(a: models.LanguageModel, b: models.LanguageModel) -> None:
    """Equal configurations, parameters bit for bit."""
    assert a.config == b.config
    chex.assert_trees_all_equal(a.params, b.params)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_a_checkpoint_is_a_parameter(name):
    lm = models.load(GOLDEN / name)
    _, tensors = read(name)
    stored = sum(t.size for key, t in tensors.items() if not (lm.config.tie_embeddings and key == "lm_head.weight"))
    assert sum(x.size for x in jax.tree.leaves(lm.params)) == stored
    assert {x.dtype for x in jax.tree.leaves(lm.params)} == {jnp.dtype("float32")}


def test_fused_tensors_are_split_in_order_of_q_k_v_and_conv1d_is_turned():
    _, tensors = read("gpt2")
    layer = models.load(GOLDEN / "gpt2").params["params"]["layers_1"]
    for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
        np.testing.assert_array_equal(
            layer["attn"][part]["weight"], np.split(tensors["transformer.h.1.attn.c_attn.weight"], 3, 1)[i].T
        )
    np.testing.assert_array_equal(layer["mlp"]["up_proj"]["weight"], tensors["transformer.h.1.mlp.c_fc.weight"].T)


def test_shards_give_what_one_file_gives(tmp_path):
    same(models.load(write(tmp_path, *read("qwen3"), shards=3)), models.load(GOLDEN / "qwen3"))


@pytest.mark.parametrize("prefix", ["", "transformer.", "language_model.model.", "model.language_model."])
def test_prefixes_of_names_do_not_matter(tmp_path, prefix):
    config, tensors = read("llama")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    same(models.load(write(tmp_path, config, renamed)), models.load(GOLDEN / "llama"))


def test_constants_and_an_equal_head_are_no_parameters(tmp_path):
    config, tensors = read("llama3_rope")
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "lm_head.weight": tensors["model.embed_tokens.weight"],
    }
    same(models.load(write(tmp_path / "a", config, tensors | more)), models.load(GOLDEN / "llama3_rope"))
    config, tensors = read("gpt2")
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), bool), "h.1.attn.masked_bias": np.ones(1, np.float32)}
    same(models.load(write(tmp_path / "b", config, tensors | mask)), models.load(GOLDEN / "gpt2"))


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16", "float16"])
def test_stored_and_wanted_dtypes(tmp_path, stored, wanted):
    config, tensors = read("llama")
    lm = models.load(write(tmp_path, config, cast(tensors, stored)), dtype=wanted)
    weight = lm.params["params"]["layers_0"]["mlp"]["down_proj"]["weight"]
    assert lm.dtype == weight.dtype == jnp.dtype(wanted or "float32")  # the default on CPU
    expected = cast(cast(tensors, stored), wanted or "float32")["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(weight, expected)


def test_dtypes_that_parameters_cannot_have():
    for dtype in ("int8", "float64", "nonsense"):
        with pytest.raises(ValueError, match="choose float32, bfloat16, float16"):
            models.load(GOLDEN / "llama", dtype=dtype)


def test_both_spellings_of_the_configuration(tmp_path):
    config, tensors = read("llama3_rope")
    rope = config.pop("rope_parameters")
    old = {**config, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    same(models.load(write(tmp_path, old, tensors)), models.load(GOLDEN / "llama3_rope"))


def test_generation_config_adds_ids_that_end_a_text(tmp_path):
    folder = copy("llama", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert models.load(folder).config.eos_ids == (2, 7)


def test_a_model_inside_a_multimodal_one(tmp_path):
    config, tensors = read("gemma3")
    outer = {"model_type": "gemma3", "text_config": config, "eos_token_id": [2, 5], "vision_config": {}}
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    renamed["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
    folder = write(tmp_path, outer, renamed)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 6}))
    lm = models.load(folder)
    assert lm.config.eos_ids == (2, 5, 6)
    chex.assert_trees_all_equal(lm.params, models.load(GOLDEN / "gemma3").params)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3_longrope"])
def test_saved_and_loaded_is_the_same_model(tmp_path, name):
    lm = models.load(GOLDEN / name)
    lm.save(tmp_path / "saved")
    again = models.load(tmp_path / "saved")
    same(again, lm)
    np.testing.assert_array_equal(again(TOKENS), lm(TOKENS))
    assert models.load_config(tmp_path / "saved") == lm.config
    half = models.load(tmp_path / "saved", dtype="bfloat16")
    chex.assert_trees_all_equal(half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params))


def test_parameters_do_not_share_memory_with_the_file(tmp_path):
    folder = copy("llama", tmp_path)
    lm = models.load(folder)
    before = {path: np.array(x) for path, x in flatten(lm.params).items()}
    file = folder / "model.safetensors"
    with file.open("r+b") as data:
        data.write(b"\xff" * file.stat().st_size)
    for path, x in flatten(lm.params).items():
        np.testing.assert_array_equal(x, before[path])


def test_logits_without_a_cache():
    lm = models.load(GOLDEN / "llama", dtype="bfloat16")
    assert (lm(TOKENS).shape, lm(TOKENS).dtype) == ((1, 24, lm.config.vocab_size), jnp.float32)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        lm([1, 2])
    with pytest.raises(ValueError, match="token id 199 is outside"):
        lm([[1, 199]])
    with pytest.raises(ValueError, match="513 tokens exceed"):
        lm(np.zeros((1, 513), np.int32))
