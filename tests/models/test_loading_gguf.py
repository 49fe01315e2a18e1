"""GGUF files written as llama.cpp's converter writes them give what the Hugging Face folder gives."""

import copy

import chex
import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import models
from tests.models.files import llama3_divisors, read, to_gguf, write

TOKENS = np.array([[1, 5, 9, 2, 44, 7, 3, 90, 12, 60, 33, 8]], np.int32)


def _gemma(config: dict) -> dict:
    """What GGUF can express of a Gemma: the scale from head_dim, windows by the family's rule."""
    config = {**config, "query_pre_attn_scalar": config["head_dim"]}
    config.pop("layer_types")
    if config["model_type"] == "gemma3_text":
        del config["sliding_window_pattern"], config["_sliding_window_pattern"]
        config["rope_parameters"]["sliding_attention"]["rope_theta"] = 10_000.0
    return config


def _more(config: dict):
    """Scalings, as metadata or as tensors."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)

    def add(writer: gguf.GGUFWriter) -> None:
        if rope.get("rope_type") == "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, config["head_dim"]))
        if rope.get("rope_type") in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope.get("rope_type") == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "partial_rotary_factor" in rope:
            head_dim = config["hidden_size"] // config["num_attention_heads"]
            writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
        if rope.get("rope_type") == "longrope":
            writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
            for kind in ("long", "short"):
                writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))

    return add


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "llama"),
        ("llama3_rope", "llama"),
        ("llama_linear", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma2", "gemma2"),
        ("gemma3", "gemma3"),
        ("phi3", "phi3"),
        ("phi3_longrope", "phi3"),
        ("gpt2", "gpt2"),
    ],
)
def test_gguf_and_folder_agree(tmp_path, name, architecture):
    config, tensors = read(name)
    if architecture.startswith("gemma"):
        config = _gemma(config)
    if name == "llama_linear":  # biases of o and of the MLP have no place in a Llama's GGUF config
        keep = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias", ".weight")
        tensors = {key: tensor for key, tensor in tensors.items() if key.endswith(keep)}
        config["mlp_bias"] = False
    folder = models.load(write(tmp_path / "folder", copy.deepcopy(config), tensors))
    file = models.load(to_gguf(tmp_path / "m.gguf", architecture, config, tensors, more=_more(config)))
    assert file.tokenizer is None
    assert (file.config.bos_id, file.config.eos_ids) == (folder.config.bos_id, folder.config.eos_ids)
    assert file.config.max_positions == folder.config.max_positions
    if not architecture.startswith("gemma"):  # whose norms have the one in their weights
        chex.assert_trees_all_equal(file.params, folder.params)
    np.testing.assert_allclose(file(TOKENS), folder(TOKENS), rtol=0, atol=2e-5)


def test_a_head_written_a_second_time_is_tied(tmp_path):
    config, tensors = read("gpt2")
    twice = tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
    lm = models.load(to_gguf(tmp_path / "m.gguf", "gpt2", config, twice))
    assert lm.config.tie_embeddings
    assert "lm_head" not in lm.params["params"]


def test_the_attention_scale_of_gemma_27b(tmp_path):
    """The one size whose scale follows from the model's width."""
    config, _ = read("gemma2")
    config |= {"num_hidden_layers": 46, "hidden_size": 96}
    table = {"model.embed_tokens.weight": np.zeros((97, 96), np.float32)}
    file = to_gguf(tmp_path / "m.gguf", "gemma2", config, table)
    assert models.load_config(file).sm_scale == pytest.approx((96 / 4) ** -0.5)


def _wide() -> tuple[dict, dict[str, np.ndarray]]:
    """A Llama of one layer whose rows are as long as a K-quant's block."""
    rng = np.random.default_rng(0)
    sizes = {"embed_tokens": (32, 256), "norm": (256,), "layers.0.mlp.down_proj": (256, 512)}
    sizes |= {f"layers.0.mlp.{part}_proj": (512, 256) for part in ("gate", "up")}
    sizes |= {f"layers.0.self_attn.{part}_proj": (256, 256) for part in "qo"}
    sizes |= {f"layers.0.self_attn.{part}_proj": (128, 256) for part in "kv"}
    sizes |= {f"layers.0.{part}_layernorm": (256,) for part in ("input", "post_attention")}
    tensors = {f"model.{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in sizes.items()}
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    return config, tensors


def _written(file) -> dict[str, tuple[np.ndarray, Kind, tuple[int, ...]]]:
    reader = gguf.GGUFReader(file)
    return {t.name: (np.array(t.data), t.tensor_type, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors}


def _f16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks[:, :2]) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks[:, :2]) * _nibbles(blocks[:, 4:]) + _f16(blocks[:, 2:4])


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """210 bytes: 128 of low nibbles, 64 of high bits, 16 scales, one float16; two halves of four lines of 32."""
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], 2)
    high = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = ((low | high << 4).astype(np.int8) - 32).reshape(-1, 16, 16)
    scale = _f16(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scale[:, :, None] * codes).reshape(-1, 256)


REFERENCES = {Kind.Q8_0: (_q8_0, 34), Kind.Q4_0: (_q4_0, 18), Kind.Q4_1: (_q4_1, 20), Kind.Q6_K: (_q6_k, 210)}


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0])
def test_quantised_weights_are_dequantised(tmp_path, kind):
    config, tensors = _wide()
    file = to_gguf(tmp_path / "m.gguf", "llama", config, tensors, kinds=[("ffn_", kind), ("attn_q", kind)])
    stored, layer = _written(file), models.load(file).params["params"]["layers_0"]
    raw, written_as, shape = stored["blk.0.ffn_down.weight"]
    assert (written_as, shape) == (kind, (256, 512))
    if kind in REFERENCES:
        reference, block = REFERENCES[kind]
        np.testing.assert_array_equal(
            layer["mlp"]["down_proj"]["weight"], reference(raw.reshape(-1, block)).reshape(shape)
        )
    error = {Kind.F16: 2e-3, Kind.BF16: 2e-2, Kind.Q8_0: 2e-2}.get(kind, 0.5)
    for part, name in (("down_proj", "mlp.down_proj"), ("up_proj", "mlp.up_proj")):
        weight = tensors[f"model.layers.0.{name}.weight"]
        np.testing.assert_allclose(layer["mlp"][part]["weight"], weight, rtol=0, atol=error)
    query = tensors["model.layers.0.self_attn.q_proj.weight"]  # rows in their own order again
    np.testing.assert_allclose(layer["attn"]["q_proj"]["weight"], query, rtol=0, atol=error)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants(tmp_path, kind):
    """The package writes none, so blocks are random bytes with sane scales."""
    config, tensors = _wide()
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(1).integers(0, 256, (512, size), np.uint8)
    for at in {Kind.Q2_K: (80, 82), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2)}.get(kind, (size - 2,)):
        blocks[:, at : at + 2] = np.float16(0.01).reshape(1).view(np.uint8)
    up = "model.layers.0.mlp.up_proj.weight"
    rest = {name: tensor for name, tensor in tensors.items() if name != up}

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)

    lm = models.load(to_gguf(tmp_path / "m.gguf", "llama", config, rest, more=add))
    weight = np.asarray(lm.params["params"]["layers_0"]["mlp"]["up_proj"]["weight"])
    np.testing.assert_array_equal(weight, gguf.dequantize(blocks, kind))
    if kind in REFERENCES:
        np.testing.assert_array_equal(weight, REFERENCES[kind][0](blocks))


def test_parameters_do_not_share_memory_with_the_file(tmp_path):
    config, tensors = _wide()
    file = to_gguf(tmp_path / "m.gguf", "llama", config, tensors)
    lm = models.load(file)
    with file.open("r+b") as data:
        data.write(b"\xff" * file.stat().st_size)
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(lm.params["params"]["layers_0"]["mlp"]["down_proj"]["weight"], down)


def test_half_precision(tmp_path):
    config, tensors = _wide()
    lm = models.load(to_gguf(tmp_path / "m.gguf", "llama", config, tensors), dtype="bfloat16")
    assert lm.dtype.name == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(lm.params)} == {"bfloat16"}
