"""ZeroC, Zhang and Shen 2024, arXiv:2408.04107; its later versions are named ZACK and FDC."""

import dataclasses
from typing import Literal, cast

import numpy as np

from kvcomp_jax.calibrate import Activations, find
from kvcomp_jax.codecs import Affine, Codec, Identity, LowRank
from kvcomp_jax.codecs.low_rank import RANKS
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.rungs import one_rung
from kvcomp_jax.spec import LayerSpec
from kvcomp_jax.types import Constant


def calibrate(layer: Activations) -> dict[str, np.ndarray]:
    """Bases f32[K, D, D] of keys and of values, a direction a column, and energies f32[K, D], descending.

    Right singular vectors, and squares of singular values, of what a head multiplies, stacked. For keys: the queries of
    the G heads that share them and G copies of the keys, all rotated, queries at the scale at which logits are
    q . k / sqrt(D). For values: G copies of them and of each of the G heads its rows of the output projection.
    """
    if layer.q is None or layer.o_weight is None:
        raise ValueError("activations without queries or output projection do not tell what keys and values meet.")
    num_tokens, num_kv_heads, dim = layer.k.shape[1:]
    groups = layer.q.shape[2] // num_kv_heads
    pos = np.arange(num_tokens, dtype=np.int32)[None]
    keys = queries = values = np.zeros(())
    for q, k, v in zip(layer.q, layer.k, layer.v, strict=True):
        q, k, v = (x.swapaxes(0, 1).astype(np.float32) for x in (q, k, v))  # [H or K, T, D]
        if layer.rope is not None:
            q, k = (np.asarray(layer.rope.apply(x, pos)) for x in (q, k))
        queries = queries + _gram(q.reshape(num_kv_heads, -1, dim) * np.float32(dim**0.5))
        keys, values = keys + groups * _gram(k), values + groups * _gram(v)
    projection = layer.o_weight.T.reshape(num_kv_heads, groups, dim, -1)
    rows = projection.swapaxes(2, 3).reshape(num_kv_heads, -1, dim)  # [K, G * M, D]
    k_basis, k_energy = _directions(queries + keys)
    v_basis, v_energy = _directions(values + _gram(rows))
    return {"k_basis": k_basis, "k_energy": k_energy, "v_basis": v_basis, "v_energy": v_energy}


def _gram(x: np.ndarray) -> np.ndarray:
    """x^T x of x [K, N, D], f64[K, D, D]."""
    x = x.astype(np.float64)
    return x.swapaxes(1, 2) @ x


def _directions(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors f32[K, D, D] in columns, and eigenvalues f32[K, D], from the largest on."""
    energy, basis = np.linalg.eigh(gram)
    return basis[..., ::-1].astype(np.float32), np.maximum(energy[:, ::-1], 0).astype(np.float32)


def rank_for(energy: np.ndarray, share: float) -> int:
    """The least rank at which every head keeps a share of its energy f32[K, D], a multiple of 16."""
    kept = np.cumsum(energy.astype(np.float64), -1)
    enough = kept >= share * kept[:, -1:]
    return -(-int(enough.argmax(-1).max() + 1) // RANKS) * RANKS


@method(
    axis="quantise",
    bits="16 or 32, or of codes, for a part of the channels",
    source="ZeroC, Zhang and Shen 2024, arXiv:2408.04107",
    advice="Where attention itself shall cost less; small heads lose much with few dimensions, and less at fewer bits.",
    settings=("", "rank=48", "rank=32"),
    calibrate=calibrate,
)
def zeroc(
    context: Context,
    *,
    rank: int | None = None,
    k_rank: int | None = None,
    v_rank: int | None = None,
    k_energy: float = 0.95,
    v_energy: float = 0.92,
    bits: int | None = None,
    num_sinks: int = 0,
    window: int = 0,
    prefill: str = "exact",
    calibration: str = "auto",
    block_size: int = 32,
) -> tuple[LayerSpec, ...]:
    """Keep the few coefficients of keys and values that hold most of their heads' energy, in calibrated directions.

    Keys are turned after RoPE, once each, with one basis a KV head; queries as they are read. Ranks are given for all
    layers (`rank`, or `k_rank` and `v_rank`), or each layer takes the least at which every head keeps `k_energy` and
    `v_energy` of its squared singular values, a multiple of 16; heads of a layer share the largest of theirs, and use
    it. The shares are ours, since the paper searches for those that its accuracy allows. Coefficients are exact, or of
    `bits` with a scale per direction and block. Prompts are read exactly; prefill=stored reads them as the paper
    does, in coefficients.
    """
    layout = context.layout
    tables = find(calibration, "zeroc", {}, layout)
    sizes = (layout.num_kv_heads, layout.head_dim)
    if tables["k_energy"].shape[1:] != sizes:
        raise ValueError(
            f"the calibration is of heads and channels {tables['k_energy'].shape[1:]}, not of "
            f"num_kv_heads={sizes[0]}, head_dim={sizes[1]}."
        )
    if layout.head_dim % RANKS:
        raise ValueError(f"head_dim={layout.head_dim} must be a multiple of {RANKS}, as ranks are.")
    if prefill not in ("exact", "stored"):
        raise ValueError(f"prefill={prefill!r} must be 'exact' or 'stored'.")
    inner: Codec = Identity() if bits is None else Affine(bits=bits, axis="channel", group_size=block_size)
    given = {"k": _given("k_rank", k_rank, rank, layout.head_dim), "v": _given("v_rank", v_rank, rank, layout.head_dim)}
    shares = {"k": _share("k_energy", k_energy), "v": _share("v_energy", v_energy)}

    def codec(layer: int, kind: str) -> Codec:
        width = given[kind] or rank_for(tables[f"{kind}_energy"][layer], shares[kind])
        return LowRank(inner=inner, basis=Constant(tables[f"{kind}_basis"][layer][..., :width]))

    def spec(layer: int) -> LayerSpec:
        k, v = codec(layer, "k"), codec(layer, "v")
        made = one_rung(context, k, v, num_sinks=num_sinks, window=window, block_size=block_size)
        return dataclasses.replace(made, prefill=cast(Literal["exact", "stored"], prefill))

    return tuple(spec(layer) for layer in range(layout.num_layers))


def _given(name: str, own: int | None, both: int | None, head_dim: int) -> int | None:
    """The rank that options state, None where energy decides."""
    name, rank = ("rank", both) if own is None else (name, own)
    if rank is not None and (rank % RANKS or not 0 < rank <= head_dim):
        raise ValueError(f"{name}={rank} must be a multiple of {RANKS}, at most head_dim={head_dim}.")
    return rank


def _share(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} is a share of the energy and must be in (0, 1].")
    return value
