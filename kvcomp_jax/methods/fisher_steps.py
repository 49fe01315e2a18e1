"""Uniform steps as fine as the loss asks for, channel by channel, and entropy coding."""

import numpy as np

from kvcomp_jax.calibrate import Activations, find
from kvcomp_jax.codecs import Codec, Entropy, PerChannel, PreRope, Stepped
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Recency
from kvcomp_jax.spec import LayerSpec, Rung, blocks
from kvcomp_jax.types import Constant


def calibrate(layer: Activations, *, num_sinks: int = 4) -> dict[str, np.ndarray]:
    """Mean, standard deviation and mean Fisher information of each channel of keys before RoPE and of values: [K, D].

    Sinks are never quantised and so left out.
    """
    found = {}
    for kind, x, weight in (("k", layer.k, layer.k_weight), ("v", layer.v, layer.v_weight)):
        x, weight = (a[:, num_sinks:].reshape(-1, *a.shape[2:]).astype(np.float64) for a in (x, weight))
        for name, value in (("mean", x.mean(0)), ("std", x.std(0)), ("weight", weight.mean(0))):
            found[f"{kind}_{name}"] = value.astype(np.float32)
    return found


@method(
    axis="quantise",
    bits="2 to 5, as data need",
    source="kvcomp_jax; steps and coding after Gish and Pierce 1968, sensitivity as in KVQuant, arXiv:2401.18079",
    advice="Little loss at 3 bits and more, once calibrated; entropy decoding and RoPE at every read cost time.",
    settings=(
        "k_step=0.44,v_step=0.36",
        "k_step=0.73,v_step=0.59,spare=0.4",
        "k_step=1.6,v_step=1.3,spare=0.31,ratio=1.41",
    ),
    calibrate=calibrate,
)
def fisher_steps(
    context: Context,
    *,
    k_step: float = 0.53,
    v_step: float = 0.43,
    spare: float | None = 0.6,
    ratio: float = 2.0,
    num_sinks: int = 4,
    window: int = 0,
    block_size: int = 20,
    calibration: str = "auto",
) -> tuple[LayerSpec, ...]:
    """Round keys before RoPE and values to steps that are finer where the loss is more sensitive; Huffman-code them.

    A channel's step is inversely proportional to the root of its Fisher information, so that all errors weigh alike,
    and a uniform step with entropy coding then loses least for its bits: loud channels take many, quiet ones none.
    Ranges play no part and are not stored. Keys: steps within a KV head average `k_step` of its standard deviations;
    values: `v_step` of those of all layers, between which sensitivity weighs, too. Averages are geometric.
    Twice the steps are about a bit a value fewer.
    Slots have room for `spare` bits a value more than normal channels of the calibrated spread take in the fullest head
    of a layer (see `Budgeted`); None: for any codes. What does not fit takes steps `ratio` times as wide. Blocks are
    short, as tokens wait exactly for one to fill; 1,020 tokens after the sinks fill theirs.
    """
    layout = context.layout
    tables = find(calibration, "fisher_steps", {"num_sinks": num_sinks}, layout)
    if tables["k_mean"].shape[1:] != (layout.num_kv_heads, layout.head_dim):
        raise ValueError(
            f"the calibration is of heads and channels {tables['k_mean'].shape[1:]}, not of "
            f"num_kv_heads={layout.num_kv_heads}, head_dim={layout.head_dim}."
        )
    k_units = _units(tables["k_std"], tables["k_weight"], axis=-1)
    v_units = _units(tables["v_std"], tables["v_weight"], axis=(0, 1, 2))

    def codec(kind: str, layer: int, units: np.ndarray, step: float) -> Codec:
        deviations = tables[f"{kind}_std"][layer] / (units * step)
        budget = None if spare is None else max(float(normal_bits(deviations).max()) + spare, 2.0)
        inner = Stepped(step=step, group_size=block_size)
        coded = Entropy(inner=inner, budget=budget, block=block_size, ratio=ratio, along="token")
        return PerChannel(inner=coded, scale=Constant(units), zero_point=Constant(tables[f"{kind}_mean"][layer]))

    def spec(layer: int) -> LayerSpec:
        k = codec("k", layer, k_units[layer], k_step)
        v = codec("v", layer, v_units[layer], v_step)
        rope = layout.rope(layer, context.max_len)
        rung = Rung(k if rope is None else PreRope(inner=k, rope=rope), v, blocks(context.max_len, block_size))
        return LayerSpec(rungs=(rung,), policy=Recency(num_sinks=num_sinks), window=window, block_size=block_size)

    return tuple(spec(layer) for layer in range(layout.num_layers))


def _units(std: np.ndarray, weight: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Steps f32[L, K, D], equal in weight * step**2 along `axis`, where they average the standard deviation."""
    std, weight = (np.maximum(x, 1e-6 * x.max()).astype(np.float64) for x in (std, weight))

    def average(x: np.ndarray) -> np.ndarray:
        return np.exp(np.log(x).mean(axis, keepdims=True))

    return (average(std) * np.sqrt(average(weight) / weight)).astype(np.float32)


def normal_bits(deviations: np.ndarray) -> np.ndarray:
    """Bits f64[K] of the codes of normal channels with deviations f32[K, D], under one table a head.

    Of a logistic curve, whose heavier tails are worth 0.07 bits, about what Huffman codes lose.
    """
    edges = np.arange(-64, 64) - 0.5
    tail = 1 / (1 + np.exp(np.clip(1.702 * edges / deviations[..., None], -80, 80)))
    p = -np.diff(tail).mean(1)
    return -(p * np.log2(np.maximum(p, 1e-30))).sum(-1)
