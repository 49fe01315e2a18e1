"""KIVI, Liu et al. 2024, arXiv:2402.02750."""

from kvcomp_jax.codecs import Affine, Identity
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Recency
from kvcomp_jax.spec import LayerSpec, Rung, blocks


@method(
    axis="quantise",
    bits="2, 3, 4, 8",
    source="KIVI, Liu et al. 2024, arXiv:2402.02750",
    advice="Long contexts at 4 bits with little loss; at 2 bits test your task first. Short ones pay for the residual.",
    settings=("bits=2", "bits=4"),
)
def kivi(
    context: Context,
    *,
    bits: int = 2,
    k_bits: int | None = None,
    v_bits: int | None = None,
    group_size: int = 32,
    residual: int = 128,
    num_sinks: int = 0,
    metadata_dtype: str = "float16",
) -> LayerSpec:
    """Quantise keys per channel and values per token, asymmetrically, and keep a recent residual exact.

    Keys leave exactness `residual` tokens at a time, as in the paper. Values there leave one by one once `residual`
    newer ones exist; here they do so by blocks of `residual`, so between R and 2R - 1 stay exact: the codes are the
    same, since a value's codes depend on its own token alone. Defaults are the paper's: 2 bits, groups of 32, R = 128.
    """
    if residual < 1 or residual % group_size:
        raise ValueError(f"residual={residual} must be a positive multiple of group_size={group_size}.")
    k = Affine(bits=k_bits or bits, axis="channel", group_size=group_size, metadata_dtype=metadata_dtype)
    v = Affine(bits=v_bits or bits, axis="token", group_size=group_size, metadata_dtype=metadata_dtype)
    return LayerSpec(
        rungs=(Rung(k, Identity(), residual), Rung(k, v, blocks(context.max_len - residual, residual))),
        policy=Recency(num_sinks=num_sinks),
        block_size=residual,
    )
