"""The FP8 cache that serving engines ship."""

from kvcomp_jax.codecs import Float8
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.rungs import one_rung
from kvcomp_jax.spec import LayerSpec


@method(
    axis="quantise",
    bits="8",
    source="FP8 formats, Micikevicius et al. 2022, arXiv:2209.05433; vLLM's fp8 cache",
    advice="Where a serving engine expects it; int8 takes hardly more bytes and loses less.",
    settings=("format=e4m3", "format=e5m2"),
)
def fp8(
    context: Context,
    *,
    format: str = "e4m3",
    scale: float | str = 1.0,
    metadata_dtype: str = "float32",
    num_sinks: int = 0,
    window: int = 0,
    block_size: int = 64,
) -> LayerSpec:
    """Store K and V as floats of one byte.

    `scale` is one number for all tokens, as engines have it, by default 1; `scale=token` gives each token and head its
    own. `format` is e4m3 (largest 448 scales) or e5m2 (57344, with one bit of mantissa fewer).
    """
    codec = Float8(format=format, scale=scale, metadata_dtype=metadata_dtype)  # type: ignore[arg-type]
    return one_rung(context, codec, codec, num_sinks=num_sinks, window=window, block_size=block_size)
