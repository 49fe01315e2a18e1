"""The two published block formats of 4-bit floats."""

from kvcomp_jax.codecs import Float4
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.rungs import one_rung
from kvcomp_jax.spec import LayerSpec


@method(
    axis="quantise",
    bits="4",
    source='NVIDIA Technical Blog, "Introducing NVFP4", June 2025',
    advice="4.5 bits where hardware multiplies e2m1 floats; elsewhere int4 is as small.",
)
def nvfp4(
    context: Context,
    *,
    scale: float | str = "token",
    metadata_dtype: str = "float32",
    num_sinks: int = 0,
    window: int = 0,
    block_size: int = 64,
) -> LayerSpec:
    """Store K and V as e2m1 floats in blocks of 16 channels with e4m3 scales, under a scale in f32.

    Published is one f32 scale a tensor; a cache that grows has no tensor, so each token and head has its own, or all
    share the calibrated number `scale`, which costs no bytes.
    """
    codec = Float4(group_size=16, block_scale="e4m3", scale=scale, metadata_dtype=metadata_dtype)  # type: ignore[arg-type]
    return one_rung(context, codec, codec, num_sinks=num_sinks, window=window, block_size=block_size)


@method(
    axis="quantise",
    bits="4",
    source="OCP Microscaling Formats 1.0, 2023; Rouhani et al. 2023, arXiv:2310.10537",
    advice="The portable format of 4-bit floats, 4.25 bits; nvfp4 has finer scales.",
)
def mxfp4(context: Context, *, num_sinks: int = 0, window: int = 0, block_size: int = 64) -> LayerSpec:
    """Store K and V as e2m1 floats in blocks of 32 channels whose scales are powers of two."""
    codec = Float4(group_size=32, block_scale="e8m0")
    return one_rung(context, codec, codec, num_sinks=num_sinks, window=window, block_size=block_size)
