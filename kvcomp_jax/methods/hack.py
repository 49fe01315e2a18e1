"""HACK, Zhang et al. 2025, arXiv:2502.03589."""

import functools
from typing import Literal, cast

from kvcomp_jax.codecs import Affine, Codec, Homomorphic, Rotated
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Recency
from kvcomp_jax.spec import LayerSpec, Rung, blocks


@method(
    axis="quantise",
    bits="2, 3, 4, 8",
    source="HACK, Zhang et al. 2025, arXiv:2502.03589",
    advice="Where integer products are fast, in prompts too; k_bits and rotate are for keys with loud channels.",
)
def hack(
    context: Context,
    *,
    bits: int = 2,
    k_bits: int | None = None,
    v_bits: int | None = None,
    group_size: int = 64,
    rounding: str = "stochastic",
    keep_sums: bool = True,
    rotate: bool = False,
    prefill: str = "stored",
    num_sinks: int = 0,
    window: int = 0,
    seed: int = 0,
    metadata_dtype: str = "float16",
) -> LayerSpec:
    """Multiply queries and probabilities, at 8 bits, with 2-bit codes of keys and values, and decode neither.

    Keys are quantised per token over `group_size` channels (the whole head where it is smaller), values per channel
    over `group_size` tokens, with the sums of codes beside them. The last length mod `group_size` tokens stay exact
    until their block is whole: the paper's values wait so, too (its requantisation elimination, always on here), and
    its keys do not; codes are the same. Prompts are read in the same arithmetic (`prefill="exact"` reads them exactly):
    where the paper quantises a prompt's values first and masks later tokens, here a query sees a block as codes once it
    is whole, as in a stream. Noise for stochastic rounding comes from a token's position. `rotate=True` turns queries
    and keys by a Hadamard matrix, which is not of the paper: per-token ranges of keys suffer from loud channels.
    Defaults are the paper's: 2 bits, partitions of 64, stochastic rounding, sums kept.
    """
    quantiser = functools.partial(
        Affine, metadata_dtype=metadata_dtype, rounding=cast(Literal["nearest", "stochastic"], rounding)
    )
    channels = min(group_size, context.layout.head_dim)
    keys = quantiser(bits=k_bits or bits, axis="token", group_size=channels, seed=2 * seed)
    values = quantiser(bits=v_bits or bits, axis="channel", group_size=group_size, seed=2 * seed + 1)
    plain, v = (Homomorphic(inner=inner, keep_sums=keep_sums) for inner in (keys, values))
    k: Codec = Rotated(inner=plain) if rotate else plain
    return LayerSpec(
        rungs=(Rung(k, v, blocks(context.max_len, group_size)),),
        policy=Recency(num_sinks=num_sinks),
        window=window,
        block_size=group_size,
        prefill=cast(Literal["exact", "stored"], prefill),
    )
