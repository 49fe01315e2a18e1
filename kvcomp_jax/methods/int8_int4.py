"""The plain quantised caches that serving engines ship: one scale a token and head."""

from kvcomp_jax.codecs import Affine
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.rungs import one_rung
from kvcomp_jax.spec import LayerSpec


@method(
    axis="quantise",
    bits="8",
    source="MaxText quantised cache (absmax per token and head)",
    advice="First choice: a quarter of float32, half of bfloat16, and no loss that perplexity shows.",
)
def int8(
    context: Context,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    num_sinks: int = 0,
    window: int = 0,
    block_size: int = 64,
) -> LayerSpec:
    """Store K and V at 8 bits, symmetric, with one scale a token and head."""
    codec = Affine(bits=8, axis="token", group_size=group_size, symmetric=symmetric)
    return one_rung(context, codec, codec, num_sinks=num_sinks, window=window, block_size=block_size)


@method(
    axis="quantise",
    bits="4",
    source="lmdeploy KV4 (asymmetric per token and head)",
    advice="Simple and fast at 4.5 bits; methods with finer groups lose less at the same width.",
)
def int4(
    context: Context,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    num_sinks: int = 0,
    window: int = 0,
    block_size: int = 64,
) -> LayerSpec:
    """Store K and V at 4 bits, asymmetric, with one scale and zero point a token and head."""
    codec = Affine(bits=4, axis="token", group_size=group_size, symmetric=symmetric)
    return one_rung(context, codec, codec, num_sinks=num_sinks, window=window, block_size=block_size)
