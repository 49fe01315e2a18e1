"""DecoQuant, Liu et al. 2024, arXiv:2405.12591."""

from kvcomp_jax.codecs import AcrossHeads, Affine, Codec, TensorTrain
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Recency
from kvcomp_jax.spec import LayerSpec, Rung, blocks


@method(
    axis="quantise",
    bits="2, 3, 4, 8",
    source="DecoQuant, Liu et al. 2024, arXiv:2405.12591",
    advice="Little metadata without calibration; blocks of 256 tokens wait exactly, so for long contexts.",
    settings=("bits=4", "bits=4,basis=run", "bits=8", "bits=2"),
)
def decoquant(
    context: Context,
    *,
    bits: int = 4,
    k_bits: int | None = None,
    v_bits: int | None = None,
    rank: int = 16,
    basis: str = "shared",
    across_heads: bool = False,
    block_size: int = 256,
    num_sinks: int = 0,
    window: int = 0,
    metadata_dtype: str = "float16",
) -> LayerSpec:
    """Factor keys and values by blocks, quantise the large factor symmetrically per token, keep the small one.

    Needs no calibration: factors come from a block's own rows. Defaults are the released code's: 4 bits, runs of 16
    channels, one basis for all; `basis=run` has one a run. There a prompt is one block over all KV heads, what exceeds
    whole multiples of a threshold stays exact, and so does every decoded token; here a block has `block_size` tokens of
    one KV head, or of all with across_heads=True, and decoded tokens are factored as soon as a block of them is there.
    """
    codecs: list[Codec] = [
        TensorTrain(
            large=Affine(bits=b or bits, axis="token", symmetric=True, metadata_dtype=metadata_dtype),
            rank=rank,
            block_size=block_size,
            basis=basis,
            dtype=metadata_dtype,
        )
        for b in (k_bits, v_bits)
    ]
    if across_heads:
        codecs = [AcrossHeads(inner=codec, num_heads=context.layout.num_kv_heads) for codec in codecs]
    k, v = codecs
    rung = Rung(k, v, blocks(context.max_len, block_size))
    return LayerSpec(rungs=(rung,), policy=Recency(num_sinks=num_sinks), window=window, block_size=block_size)
