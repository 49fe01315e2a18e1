"""config.json of both spellings, what released ones omit, and what is refused."""

import json
import math

import pytest

from models import ModelConfig
from models.rope import RopeConfig
from tests.models.golden import FOLDER, NAMES
from tests.models.released import (
    EIGHT_B,
    GEMMA2,
    GEMMA3_1B,
    GEMMA3_4B,
    GPT2,
    LLAMA2,
    LLAMA3_1,
    MISTRAL,
    PARAMETERS,
    PHI3,
    PHI3_128K,
    PHI4_MINI,
    QWEN2_5,
    QWEN3,
)

read = ModelConfig.from_hf


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def renamed(values):
    """The same configuration in the new spelling."""
    params = {"rope_theta": values["rope_theta"], **(values.get("rope_scaling") or {})}
    params["rope_type"] = params.pop("type", params.get("rope_type", "default"))
    if "partial_rotary_factor" in values:
        params["partial_rotary_factor"] = values["partial_rotary_factor"]
    return without(values, "rope_theta", "rope_scaling", "partial_rotary_factor") | {"rope_parameters": params}


@pytest.mark.parametrize("values", [EIGHT_B, LLAMA3_1, MISTRAL, QWEN2_5, QWEN3, GEMMA2, PHI3, PHI3_128K, PHI4_MINI])
def test_both_spellings_mean_the_same(values):
    assert read(renamed(values)) == read(values)


def test_both_spellings_of_gemma3_mean_the_same():
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000},
    }
    new = without(GEMMA3_1B, "rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(26)]
    assert read(new | {"rope_parameters": nested, "layer_types": types}) == read(GEMMA3_1B)
    assert read(new) == read(GEMMA3_1B)  # all of them are the defaults


@pytest.mark.parametrize("values", [values for values, _ in PARAMETERS.values()], ids=PARAMETERS)
def test_json_round_trip(values):
    config = read(values)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_hashable_and_fit_a_cache(name):
    config = read(json.loads((FOLDER / name / "config.json").read_text()))
    assert hash(config) == hash(read(json.loads((FOLDER / name / "config.json").read_text())))
    assert config.layout.sliding_windows == config.sliding_windows
    assert len(config.sliding_windows) == config.num_layers


def test_gemma2_fills_in_what_its_releases_omit():
    config = read(GEMMA2)
    assert (config.head_dim, config.sm_scale) == (256, 1 / 16)
    assert (config.attn_soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    assert config.sliding_windows == (4096, None) * 21
    assert config.tie_embeddings
    assert config.embed_scale == math.sqrt(3584)
    assert (config.bos_id, config.eos_ids) == (2, (1,))
    assert read(GEMMA2 | {"final_logit_softcapping": None}).logit_soft_cap is None


def test_gemma3_inside_a_multimodal_config():
    config = read(GEMMA3_4B)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert config.sliding_windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    assert config.ropes[0] == RopeConfig(theta=10_000.0, dim=256)
    assert config.ropes[5] == RopeConfig(kind="linear", theta=1_000_000.0, dim=256, factor=8.0)
    assert config.max_positions == 131_072
    assert config.eos_ids == (1, 106)
    assert config.qk_norm
    assert config.tie_embeddings


def test_sliding_windows():
    assert read(MISTRAL).sliding_windows == (4096,) * 32
    assert read(MISTRAL | {"sliding_window": None}).sliding_windows == (None,) * 32
    assert read(without(MISTRAL, "sliding_window")).sliding_windows == (4096,) * 32
    assert read(QWEN2_5).sliding_windows == (None,) * 28
    used = QWEN2_5 | {"use_sliding_window": True, "max_window_layers": 26}
    assert read(used).sliding_windows == (None,) * 26 + (131_072,) * 2
    types = ["sliding_attention"] + ["full_attention"] * 27
    assert read(used | {"layer_types": types}).sliding_windows == (131_072,) + (None,) * 27


def test_head_counts_and_positions_left_out():
    assert read(LLAMA2).num_kv_heads == 32
    assert read(without(MISTRAL, "num_key_value_heads")).num_kv_heads == 8
    assert read(without(QWEN3, "head_dim")).head_dim == 128
    assert read(LLAMA2).ropes[0] == RopeConfig(theta=10_000.0, dim=128)
    assert read(GPT2).ffn_dim == 3072
    assert read(GPT2).tie_embeddings
    assert read(GPT2).ropes == ()
    assert [read(without(v, "rms_norm_eps")).norm_eps for v in (LLAMA2, QWEN3, GEMMA2, PHI3)] == [
        1e-6,
        1e-6,
        1e-6,
        1e-5,
    ]


def test_activations():
    assert {read(values).activation for values in (GPT2, GEMMA2, GEMMA3_1B)} == {"gelu_tanh"}
    assert read(without(GPT2, "activation_function")).activation == "gelu_tanh"
    assert read(GEMMA2 | {"hidden_act": "gelu"}).activation == "gelu_tanh"  # hidden_activation alone counts
    assert read(GPT2 | {"activation_function": "gelu"}).activation == "gelu"
    assert read(LLAMA2).activation == "silu"


def test_context_that_a_scaling_extends():
    for kind in ("linear", "dynamic"):
        assert read(LLAMA2 | {"rope_scaling": {"type": kind, "factor": 2.0}}).max_positions == 8192
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    assert read(QWEN2_5 | {"rope_scaling": yarn}).max_positions == 131_072
    assert read(LLAMA3_1).max_positions == 131_072
    assert read(PHI3_128K).max_positions == 131_072


def test_longrope():
    rope = read(PHI3_128K).ropes[0]
    assert (rope.kind, rope.original_max, rope.factor) == ("longrope", 4096, 32.0)
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert read(PHI4_MINI).ropes[0].dim == 96


LLAMA3_ROPE = LLAMA3_1["rope_scaling"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (without(EIGHT_B, "model_type"), "model_type=None is not supported; supported: gemma2, gemma3_text, gpt2"),
        (EIGHT_B | {"model_type": "mamba"}, "model_type='mamba' is not supported; supported: "),
        (EIGHT_B | {"architectures": ["LlamaForSequenceClassification"]}, "supported: LlamaForCausalLM"),
        ({"model_type": "llava", "text_config": EIGHT_B}, "model_type='llava' is not supported"),
        (EIGHT_B | {"hidden_act": "relu6"}, "hidden_act='relu6' is not supported; supported: gelu, "),
        (GPT2 | {"activation_function": "tanh"}, "activation_function='tanh' is not supported"),
        (without(EIGHT_B, "hidden_size"), "model_type='llama' lacks 'hidden_size'"),
        (EIGHT_B | {"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
        (EIGHT_B | {"vocab_size": "many"}, "vocab_size='many' must be a positive integer"),
        (EIGHT_B | {"num_key_value_heads": 7}, "num_attention_heads=32 must be a multiple of num_key_value_heads=7"),
        (EIGHT_B | {"hidden_size": 4100}, "hidden_size=4100 must be a multiple of num_attention_heads=32"),
        (EIGHT_B | {"head_dim": 127}, "head_dim=127 rotates 127 dimensions; they must be even"),
        (EIGHT_B | {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        (GEMMA3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        (QWEN3 | {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers=36"),
        (QWEN3 | {"layer_types": ["linear_attention"] * 36}, "layer_types='linear_attention' is not supported"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window=0 must be a positive integer"),
        (EIGHT_B | {"rope_scaling": {"type": "ntk"}}, "rope_type='ntk' is not supported; supported: default, linear"),
        (EIGHT_B | {"rope_scaling": {"rope_type": "linear"}}, "lack 'factor'"),
        (EIGHT_B | {"rope_scaling": {"type": "linear", "factor": "two"}}, "factor='two' must be a positive number"),
        (EIGHT_B | {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "must be less than high_freq_factor"),
        (EIGHT_B | {"rope_parameters": [1]}, r"rope_parameters=\[1\] must be an object"),
        (EIGHT_B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 with model_type='llama' is not"),
        (PHI4_MINI | {"partial_rotary_factor": 1.0}, "short_factor=.* must be a list of 64 numbers"),
    ],
)
def test_refusals_name_field_value_and_what_is_supported(values, message):
    with pytest.raises(ValueError, match=message):
        read(values)
