"""Make the tiny checkpoints of `tests/golden/models` and what transformers computes with them.

Not run by the tests. It needs torch and transformers (5.23 made what is committed), CPU, a minute:

    python tests/golden/make_model_goldens.py [name ...]

Each folder has config.json and model.safetensors in bfloat16 (values that float32 holds exactly) and golden.npz,
computed in float32 with eager attention:
  tokens i64[2, 48]; logits f32[2, 48, V]; short_logits f32[2, 24, V], a pass over the first 24 tokens alone, where
  dynamic and longrope frequencies differ; greedy i64[1, 48], 24 tokens of row 0 and 24 greedy ones, every step a pass
  without a cache; k{i}, v{i} f32[2, num_kv_heads, 48, head_dim] of layer i, keys after RoPE.
Contexts and windows are shorter than 48 tokens, so that every scaling and every window takes part.
`llama llama3_rope mistral_window qwen3 gpt2` were made elsewhere, in float32, with the same fields but `short_logits`;
windowed layers have the last tokens alone there.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache

FOLDER = Path(__file__).parent / "models"
NUM_TOKENS, PROMPT, MARGIN = 48, 24, 5e-3
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 8, "final_logit_softcapping": 6.0}


def rope(kind: str = "default", theta: float = 10_000.0, **options: Any) -> dict[str, Any]:
    """Rope parameters in the new spelling."""
    return {"rope_type": kind, "rope_theta": theta, **options}


# head_dim of Phi-3 is hidden_size // num_attention_heads, here 16 of which 8 rotate.
PHI3 = {"hidden_size": 64, "head_dim": None, "original_max_position_embeddings": 32, "max_position_embeddings": 128}
LONGROPE = {"partial_rotary_factor": 0.5, "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.2, 2.0, 3.5, 5.0]}
# Of the 8 pairs the first two keep their frequencies, the last two are divided, and the rest lie between.
YARN = {"theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 2.0, "beta_slow": 0.25}
YARN_CONTEXT = {"max_position_embeddings": 128}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_linear": (
        "Llama",
        {"rope_parameters": rope("linear", factor=2.5), "attention_bias": True, "mlp_bias": True},
    ),
    "llama_dynamic": ("Llama", {"rope_parameters": rope("dynamic", factor=3.0), "num_key_value_heads": 1}),
    "llama_yarn": ("Llama", {"rope_parameters": rope("yarn", **YARN), "tie_word_embeddings": True, **YARN_CONTEXT}),
    "llama_yarn_mscale": (
        "Llama",
        {"rope_parameters": rope("yarn", mscale=1.4, mscale_all_dim=0.7, truncate=False, **YARN), **YARN_CONTEXT},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "max_position_embeddings": 64}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "max_position_embeddings": 64},
    ),
    "gemma2": ("Gemma2", dict(GEMMA, attn_logit_softcapping=4.0, max_position_embeddings=64)),
    "gemma3": (
        "Gemma3Text",
        dict(
            GEMMA,
            sliding_window_pattern=2,
            rope_parameters={
                "full_attention": rope("linear", 1_000_000.0, factor=8.0),
                "sliding_attention": rope(theta=5_000.0),
            },
            max_position_embeddings=64,
        ),
    ),
    "phi3": ("Phi3", dict(PHI3, rope_parameters=rope(), sliding_window=8)),
    "phi3_longrope": ("Phi3", dict(PHI3, rope_parameters=rope("longrope", **LONGROPE))),
}


def make(name: str, family: str, options: dict[str, Any]) -> None:
    """Write one folder, with the first seed whose greedy choices are clear."""
    sizes = {key: value for key, value in {**SIZES, **options}.items() if value is not None}
    config = getattr(transformers, f"{family}Config")(**sizes)
    config._attn_implementation = "eager"
    for seed in range(100):
        model = random_model(getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM"), config, seed)
        tokens = torch.randint(3, config.vocab_size, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(seed))
        greedy, margin = continue_greedily(model, tokens[:1, :PROMPT])
        if margin > MARGIN:
            break
    else:
        raise RuntimeError(f"{name}: no seed without ties.")
    arrays = {"tokens": tokens, "greedy": greedy, "short_logits": model(tokens[:, :PROMPT], use_cache=False).logits}
    cache = DynamicCache()  # made without a config it keeps every token, also of windowed layers
    arrays["logits"] = model(tokens, past_key_values=cache, use_cache=True).logits
    for i, layer in enumerate(cache.layers):
        arrays[f"k{i}"], arrays[f"v{i}"] = layer.keys, layer.values
    folder = FOLDER / name
    np.savez_compressed(folder_of(model, folder) / "golden.npz", **{key: x.numpy() for key, x in arrays.items()})
    spread = float(arrays["logits"].std())
    print(f"{name}: seed {seed}, margin {margin:.4f}, std of logits {spread:.2f}")


def random_model(cls: Any, config: Any, seed: int) -> Any:
    """A float32 model whose weights bfloat16 holds, large enough that every part shows in the logits."""
    model = cls(config).float().eval()
    draw = torch.Generator().manual_seed(1000 + seed)
    for name, weight in model.named_parameters():
        x = torch.randn(weight.shape, generator=draw)
        if weight.ndim == 1:
            centred = name.endswith("bias") or "Gemma" in type(model).__name__
            x = 0.3 * x if centred else 1 + 0.3 * x
        elif "embed" not in name:
            x = 1.5 * x / weight.shape[1] ** 0.5
        weight.data = x.bfloat16().float()
    return model


def continue_greedily(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Append the likeliest token until `NUM_TOKENS`; also the smallest lead of a choice over the next best."""
    margin = float("inf")
    while tokens.shape[1] < NUM_TOKENS:
        best = model(tokens, use_cache=False).logits[:, -1].topk(2)
        margin = min(margin, float(best.values[0, 0] - best.values[0, 1]))
        tokens = torch.cat([tokens, best.indices[:, :1]], 1)
    return tokens, margin


def folder_of(model: Any, folder: Path) -> Path:
    """Save config and weights in bfloat16, and nothing else."""
    model.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


if __name__ == "__main__":
    with torch.no_grad():
        for case in sys.argv[1:] or CASES:
            make(case, *CASES[case])
