"""Rotations folded into a model's weights: the same logits from hidden states without outlier channels.

An RMS norm without gains commutes with an orthonormal matrix Q, so the residual stream may be turned by Q if whatever
reads it turns back. Likewise the values of each head, the attention output across heads and the hidden layer of the MLP
may be turned if the linear map after them turns back; the last two need a rotation while the model runs.
Source: QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4; nothing is subtracted from embeddings, which only
layer norms need.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.language_model import LanguageModel
from models.names import flatten, unflatten
from pallas_kernels.hadamard import rotate_blocks_host

_GAIN = {  # the norm before each map that reads the residual stream
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_norm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "mlp_norm"),
}


def rotate(
    lm: LanguageModel,
    *,
    residual: bool = True,
    values: bool = True,
    heads: bool = True,
    ffn: bool = True,
    seed: int = 0,
) -> LanguageModel:
    """Fold rotations into the weights; logits stay the same up to rounding.

    Rotations are Hadamard matrices, in blocks where there is none for a size (see `hadamard_blocks`); the residual
    stream's has random signs. Computed in float64 on the host, one tensor at a time, and kept in the model's dtype.

    Args:
      lm: The model. Its weights are copied, not changed.
      residual: Rotate the residual stream; gains of norms go into the maps after them, embeddings are untied.
      values: Rotate the values of each head. A cache then holds rotated values: pass `rotate_v=False` to a method that
        rotates values itself.
      heads: Rotate the attention output across heads, before the output map, at run time.
      ffn: Rotate the MLP's hidden layer, before the down map, at run time.
      seed: Of the signs.

    Raises:
      ValueError: If the model has layer norms, or norms after attention and MLP, which do not commute with a rotation
        of the residual stream; if a part is rotated already, or weights are packed.
    """
    _check(lm.config, residual, heads, ffn)
    config = dataclasses.replace(
        lm.config,
        tie_embeddings=lm.config.tie_embeddings and not residual,
        rotate_heads=heads or lm.config.rotate_heads,
        rotate_ffn=ffn or lm.config.rotate_ffn,
    )
    flat = flatten(lm.params["params"])
    if lm.config.tie_embeddings and residual:
        flat["lm_head.weight"] = flat["embed_tokens.weight"]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], config.model_dim)
    turned = {}
    for path, leaf in flat.items():
        weight = np.asarray(leaf, np.float64)
        if residual:
            weight = _with_residual(flat, path, weight, signs)
        weight = _within_layer(config, path, weight, values, heads, ffn)
        turned[path] = jnp.asarray(weight, leaf.dtype)
    return LanguageModel(config, {"params": unflatten(turned)}, lm.tokenizer)


def _check(config: ModelConfig, residual: bool, heads: bool, ffn: bool) -> None:
    if config.integers.weight_bits is not None:
        raise ValueError("the weights are packed in integers already; rotate first, then quantise.")
    if (heads and config.rotate_heads) or (ffn and config.rotate_ffn):
        raise ValueError("heads or ffn of this model are rotated already; rotate a model once.")
    way_out = "pass residual=False to rotate the other parts"
    if residual and config.norm == "layer":
        raise ValueError(f"norm='layer' of {config.family} subtracts a mean, which no rotation keeps; {way_out}.")
    if residual and (config.post_norms or config.norm != "rms"):
        raise ValueError(
            f"post_norms={config.post_norms} and norm={config.norm!r} of {config.family}: gains between a map and the "
            f"residual stream cannot be folded; {way_out}."
        )


def _with_residual(flat: Mapping[str, Any], path: str, weight: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """A parameter of the model whose residual stream is x Q, Q = diag(signs) H. Weights are [out, in]."""
    layer, _, name = path.rpartition(".")[0].rpartition(".")
    owner = layer.partition(".")[0]  # layers_{i}
    if name in ("input_norm", "mlp_norm", "final_norm"):
        return np.ones_like(weight)
    if name in ("o_proj", "down_proj"):  # write it: y Q; a bias is one such row
        return rotate_blocks_host(weight.T * signs).T if weight.ndim == 2 else rotate_blocks_host(weight * signs)
    if name == "embed_tokens":
        return rotate_blocks_host(weight * signs)
    gain = "final_norm" if name == "lm_head" else f"{owner}.{_GAIN[name]}" if name in _GAIN else None
    if gain is None or weight.ndim == 1:  # norms of q and k, and biases, which are no part of the stream
        return weight
    return rotate_blocks_host(weight * np.asarray(flat[f"{gain}.weight"], np.float64) * signs)


def _within_layer(
    config: ModelConfig, path: str, weight: np.ndarray, values: bool, heads: bool, ffn: bool
) -> np.ndarray:
    """A parameter with the rotations between two maps of a layer; each is symmetric and its own inverse."""
    name = path.split(".")[-2]
    if values and name == "v_proj":
        return _along(weight, 1, (config.num_kv_heads, config.head_dim, -1), rotate_blocks_host)
    if name == "o_proj" and weight.ndim == 2:
        shape = (-1, config.num_heads, config.head_dim)
        weight = _along(weight, 2, shape, rotate_blocks_host) if values else weight
        return _along(weight, 1, shape, rotate_blocks_host) if heads else weight
    if ffn and name == "down_proj" and weight.ndim == 2:
        return rotate_blocks_host(weight)
    return weight


def _along(
    weight: np.ndarray, axis: int, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Change a weight along one axis of another shape of it."""
    moved = np.moveaxis(weight.reshape(shape), axis, -1)
    return np.moveaxis(change(moved), -1, axis).reshape(weight.shape)
