"""What a model is: sizes and switches, read from a Hugging Face config.json of either spelling."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import kvcomp_jax as kvc
from models.families import ConfigError, read_config
from models.integers import IntegerFormat
from models.rope import RopeConfig, rotary

__all__ = ["ConfigError", "ModelConfig", "RopeConfig"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes in elements, one transformer for all families."""

    family: str
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_positions: int
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # Gemma 2 and 3: norms after attention and MLP as well
    tie_embeddings: bool = False
    embed_scale: float = 1.0
    positions: Literal["rope", "learned"] = "rope"
    position_offset: int = 0  # OPT's table starts two rows late
    ropes: tuple[RopeConfig, ...] = ()  # one a layer
    sliding_windows: tuple[int | None, ...] = ()  # one a layer
    sm_scale: float | None = None
    attn_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    rotate_heads: bool = False  # attention output across heads, which the output map undoes; see `rotation`
    rotate_ffn: bool = False  # hidden layer of the MLP, which the down map undoes
    integers: IntegerFormat = IntegerFormat()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def layout(self) -> kvc.Layout:
        """What a cache plan needs to know."""
        return kvc.Layout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            sliding_windows=self.sliding_windows,
            max_positions=self.max_positions,
            ropes=tuple(rotary(rope) for rope in self.ropes),
            num_heads=self.num_heads,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json, in the spelling `rope_parameters` or `rope_theta` and `rope_scaling`.

        Raises:
          ValueError: If the architecture, rope type or activation is unknown, or a size is missing or impossible.
        """
        made = cls(**read_config(config))
        if made.num_heads % made.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={made.num_heads} must be a multiple of num_key_value_heads={made.num_kv_heads}."
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Undo `to_dict`."""
        values = dict(values)
        values["ropes"] = tuple(RopeConfig.from_dict(rope) for rope in values["ropes"])
        values["sliding_windows"] = tuple(values["sliding_windows"])
        values["eos_ids"] = tuple(values["eos_ids"])
        values["integers"] = IntegerFormat(**values.get("integers", {}))
        return cls(**values)
