"""Where each family's checkpoint keeps each parameter: tables of patterns, and how tensors are split or turned."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from models.config import ModelConfig
from models.errors import CheckpointError

# Checkpoint name (without a leading "model." or the like) -> path of our parameter; {} is the layer's number. Where a
# tensor holds several parameters, one under the other, their names stand as [a|b]; " T" marks [in, out].
_LLAMA = {
    "embed_tokens.weight": "embed_tokens.weight",
    "norm.weight": "final_norm.weight",
    "lm_head.weight": "lm_head.weight",
    "layers.{}.input_layernorm.weight": "layers_{}.input_norm.weight",
    "layers.{}.post_attention_layernorm.weight": "layers_{}.mlp_norm.weight",
    **{
        f"layers.{{}}.self_attn.{p}_proj.{kind}": f"layers_{{}}.attn.{p}_proj.{kind}"
        for p in "qkvo"
        for kind in ("weight", "bias")
    },
    **{
        f"layers.{{}}.mlp.{p}_proj.{kind}": f"layers_{{}}.mlp.{p}_proj.{kind}"
        for p in ("gate", "up", "down")
        for kind in ("weight", "bias")
    },
    "layers.{}.self_attn.q_norm.weight": "layers_{}.attn.q_norm.weight",
    "layers.{}.self_attn.k_norm.weight": "layers_{}.attn.k_norm.weight",
}
_GEMMA = {
    **_LLAMA,
    "layers.{}.post_attention_layernorm.weight": "layers_{}.post_attn_norm.weight",
    "layers.{}.pre_feedforward_layernorm.weight": "layers_{}.mlp_norm.weight",
    "layers.{}.post_feedforward_layernorm.weight": "layers_{}.post_mlp_norm.weight",
}
_PHI3 = {
    **{name: path for name, path in _LLAMA.items() if not re.search(r"\.(q|k|v|gate|up)_proj\.", name)},
    "layers.{}.self_attn.qkv_proj.weight": "layers_{}.attn.[q_proj|k_proj|v_proj].weight",
    "layers.{}.mlp.gate_up_proj.weight": "layers_{}.mlp.[gate_proj|up_proj].weight",
}
_GPT2 = {
    "wte.weight": "embed_tokens.weight",
    "wpe.weight": "embed_positions.weight",
    "ln_f.weight": "final_norm.weight",
    "ln_f.bias": "final_norm.bias",
    "lm_head.weight": "lm_head.weight",
    **{
        f"h.{{}}.{theirs}.{kind}": f"layers_{{}}.{ours}.{kind}"
        for theirs, ours in (("ln_1", "input_norm"), ("ln_2", "mlp_norm"))
        for kind in ("weight", "bias")
    },
    **{
        f"h.{{}}.{theirs}.{kind}": f"layers_{{}}.{ours}.{kind}" + (" T" if kind == "weight" else "")
        for theirs, ours in (
            ("attn.c_attn", "attn.[q_proj|k_proj|v_proj]"),
            ("attn.c_proj", "attn.o_proj"),
            ("mlp.c_fc", "mlp.up_proj"),
            ("mlp.c_proj", "mlp.down_proj"),
        )
        for kind in ("weight", "bias")
    },
}
_TABLES = {"gemma2": _GEMMA, "gemma3_text": _GEMMA, "phi3": _PHI3, "gpt2": _GPT2}
_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "transformer.", "model.")
_NO_PARAMETERS = (  # constants, and the other senses of a multimodal model
    r"rotary_emb\.inv_freq$|(^|\.)attn\.(bias|masked_bias)$|\.position_ids$"
    r"|^(model\.)?(vision_tower|vision_model|multi_modal_projector)\."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Names:
    """How one kind of checkpoint names its tensors.

    `patterns` maps a tensor's name to our path; `ignored` is a pattern of names that hold no parameter.
    """

    patterns: Mapping[str, str]
    prefixes: tuple[str, ...] = ()
    ignored: str = r"(?!)"

    def place(self, name: str) -> str | None:
        """Our path for a checkpoint's tensor, with the marks of the table; None if the table does not have it."""
        name = next((name[len(p) :] for p in self.prefixes if name.startswith(p)), name)
        numbered = re.search(r"\.(\d+)\.", name)
        if not numbered:
            return self.patterns.get(name)
        path = self.patterns.get(name[: numbered.start()] + ".{}." + name[numbered.end() :])
        return path and path.replace("{}", numbered.group(1))

    def ignores(self, name: str) -> bool:
        """Whether a tensor is something other than a parameter of ours."""
        return bool(re.search(self.ignored, name))

    def source(self, path: str) -> str:
        """The checkpoint's name of our parameter, for messages: the first of the table that gives it."""
        numbered = re.sub(r"^layers_\d+", "layers_{}", path)
        layer = re.findall(r"^layers_(\d+)", path)
        found = next((name for name, ours in self.patterns.items() if numbered in _members(ours)), path)
        return found.replace("{}", *layer) if layer else found


def hugging_face(config: ModelConfig) -> Names:
    """Names in the safetensors of a family."""
    return Names(_TABLES.get(config.family, _LLAMA), _PREFIXES, _NO_PARAMETERS)


def pieces(config: ModelConfig, path: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters in a checkpoint's tensor: split, and turned to [out, in].

    Raises:
      CheckpointError: If the tensor has not as many rows as its parts.
    """
    path, turned = path.removesuffix(" T"), path.endswith(" T")
    if turned:
        tensor = tensor.T
    group = re.search(r"\[(.*)\]", path)
    if not group:
        yield path, tensor
        return
    names = group.group(1).split("|")
    rows = [_rows(config, name) for name in names]
    if sum(rows) != tensor.shape[0]:
        raise CheckpointError(f"has {tensor.shape[0]} rows, expected {' + '.join(map(str, rows))}")
    for name, part in zip(names, np.split(tensor, np.cumsum(rows)[:-1]), strict=True):
        yield path[: group.start()] + name + path[group.end() :], part


def _members(path: str) -> list[str]:
    """a.[b|c].d T -> a.b.d, a.c.d."""
    path = path.removesuffix(" T")
    group = re.search(r"\[(.*)\]", path)
    if not group:
        return [path]
    return [path[: group.start()] + name + path[group.end() :] for name in group.group(1).split("|")]


def _rows(config: ModelConfig, name: str) -> int:
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
    return heads[name] * config.head_dim if name in heads else config.ffn_dim


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to {"a.b.c": leaf}."""
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        flat.update(flatten(node, path + ".") if isinstance(node, dict) else {path: node})
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
