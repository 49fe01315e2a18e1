"""KVQuant, Hooper et al. 2024, arXiv:2401.18079."""

import numpy as np

from kvcomp_jax.calibrate import Activations, find, restore_moments, weighted_kmeans
from kvcomp_jax.codecs import AcrossHeads, Codebook, Codec, Outliers, PerChannel, PreRope
from kvcomp_jax.codecs.codebook import BITS
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.rungs import one_rung
from kvcomp_jax.spec import LayerSpec
from kvcomp_jax.types import Constant


def calibrate(
    layer: Activations, *, bits: int, outliers: float = 0.01, num_sinks: int = 1, across_heads: bool = True
) -> dict[str, np.ndarray]:
    """Scale and zero point of each key channel, and levels of keys and values with those read under Q-Norm.

    A key channel's range holds what is left of it once each token's outliers are taken out: as many are stored of a
    token as its share allows, and what lies beyond a range and finds no room is clipped. A token of values is brought
    to -1 .. 1 without its outliers, as it will be when it is stored. Levels are fitted, weighted by the Fisher
    information, to what is within; sinks are never quantised and so left out.
    """
    k, k_weight, v, v_weight = (x[:, num_sinks:].reshape(-1, *x.shape[2:]) for x in
                                (layer.k, layer.k_weight, layer.v, layer.v_weight))  # [N, K, D]  # fmt: skip
    low, high = _ranges(k, outliers, across_heads)
    k_scale = np.maximum((high - low) / 2, 1e-6 + 1e-6 * np.abs(high)).astype(np.float32)
    k_zero_point = ((high + low) / 2).astype(np.float32)
    if across_heads:
        v, v_weight = (x.reshape(len(x), 1, -1) for x in (v, v_weight))
    cut = per_side(outliers, v.shape[-1])
    ends = np.sort(v, -1)[..., [cut, -1 - cut]]
    middle, half = ends.mean(-1, keepdims=True), np.diff(ends)[..., :1] / 2
    v_units = (v - middle) / np.maximum(half, 1e-12)
    k_levels, k_values = _levels((k - k_zero_point) / k_scale, k_weight, bits)
    v_levels, v_values = _levels(v_units, v_weight, bits)
    named = {"k_scale": k_scale, "k_zero_point": k_zero_point}
    return named | {"k_levels": k_levels, "k_values": k_values, "v_levels": v_levels, "v_values": v_values}


def _ranges(k: np.ndarray, outliers: float, across_heads: bool) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest f32[K, D] of keys [N, K, D] without each token's outliers.

    Which are outliers depends on ranges, and they on outliers: as in the paper's code, first ranges are those between
    which all but the outliers' share lies.
    """
    low, high = np.quantile(k, (outliers / 2, 1 - outliers / 2), axis=0)
    if not outliers:
        return low, high
    units = (k - (high + low) / 2) / np.maximum(high - low, 1e-12)
    rows = (len(k), 1, -1) if across_heads else k.shape
    cut = per_side(outliers, units.reshape(rows).shape[-1])
    order = np.argsort(units.reshape(rows), axis=-1)
    rest = np.ones(order.shape, bool)
    np.put_along_axis(rest, np.concatenate([order[..., :cut], order[..., -cut:]], -1), False, -1)
    rest = rest.reshape(k.shape)
    least, greatest = np.min(k, 0, where=rest, initial=np.inf), np.max(k, 0, where=rest, initial=-np.inf)
    seen = rest.any(0)
    return np.where(seen, least, low), np.where(seen, greatest, high)


def _levels(units: np.ndarray, weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels of what lies within -1 .. 1, and those that restore its mean and spread."""
    inside = np.abs(units) <= 1
    x, weight = units[inside], weight[inside]
    start = np.quantile(x, (np.arange(2**bits) + 0.5) / 2**bits)
    levels, _ = weighted_kmeans(x, weight, start)
    return levels.astype(np.float32), restore_moments(levels, x).astype(np.float32)


def per_side(outliers: float, channels: int) -> int:
    """Outliers kept on each side of a row: half of the share, rounded down, and one."""
    return int(outliers / 2 * channels) + 1 if outliers else 0


@method(
    axis="quantise",
    bits="2, 3, 4",
    source="KVQuant, Hooper et al. 2024, arXiv:2401.18079",
    advice="2 or 3 bits where a text for calibration is at hand; reads rotate keys and add outliers, which costs time.",
    settings=("bits=4", "bits=3", "bits=2"),
    calibrate=calibrate,
)
def kvquant(
    context: Context,
    *,
    bits: int = 3,
    outliers: float = 0.01,
    num_sinks: int = 1,
    window: int = 0,
    across_heads: bool = True,
    q_norm: bool | None = None,
    calibration: str = "auto",
    block_size: int = 32,
) -> tuple[LayerSpec, ...]:
    """Store keys per channel before their rotation and values per token, at calibrated levels, outliers apart.

    Ranges of key channels are calibrated, those of values are each token's own. Of each token the most extreme values,
    a share `outliers`, are kept beside it: among keys, ranked by how far they are in their channel's range, exactly as
    many as among values, so that slots that the paper leaves empty hold the next most extreme; ranges are calibrated
    for so many. Heads are joined as in
    the paper; across_heads=False treats each head alone, at more bits, so that a policy may rank tokens by head.
    Q-Norm is on at 2 bits by default. Tokens wait exactly for a block of `block_size`, because words pack several.
    Ranges and offsets of values are stored once a token, not as a whole codebook.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits} must be one of {', '.join(map(str, BITS))}.")
    if not 0 <= outliers < 0.5:
        raise ValueError(f"outliers={outliers} is a share of the values and must be in [0, 0.5).")
    layout = context.layout
    made_with = {"bits": bits, "outliers": outliers, "num_sinks": num_sinks, "across_heads": across_heads}
    tables = find(calibration, "kvquant", made_with, layout)
    sizes = (layout.num_kv_heads, layout.head_dim)
    if tables["k_scale"].shape[1:] != sizes:
        raise ValueError(
            f"the calibration is of heads and channels {tables['k_scale'].shape[1:]}, not of "
            f"num_kv_heads={sizes[0]}, head_dim={sizes[1]}."
        )
    joined = layout.num_kv_heads if across_heads else 1
    count = 2 * per_side(outliers, joined * layout.head_dim)
    corrected = bits == 2 if q_norm is None else q_norm

    def codec(layer: int, kind: str, normalise: str) -> Codec:
        levels, values = (Constant(tables[f"{kind}_{name}"][layer]) for name in ("levels", "values"))
        inner: Codec = Codebook(levels=levels, values=values if corrected else None, normalise=normalise)
        inner = Outliers(inner=inner, num_outliers=count) if count else inner
        return AcrossHeads(inner=inner, num_heads=joined) if joined > 1 else inner

    def spec(layer: int) -> LayerSpec:
        scale, zero_point = (Constant(tables[f"k_{name}"][layer]) for name in ("scale", "zero_point"))
        k: Codec = PerChannel(inner=codec(layer, "k", "none"), scale=scale, zero_point=zero_point)
        rope = layout.rope(layer, context.max_len)
        k = k if rope is None else PreRope(inner=k, rope=rope)
        v = codec(layer, "v", "range")
        return one_rung(context, k, v, num_sinks=num_sinks, window=window, block_size=block_size)

    return tuple(spec(layer) for layer in range(layout.num_layers))
