"""Specs that several methods share."""

from kvcomp_jax.codecs import Codec
from kvcomp_jax.methods.registry import Context
from kvcomp_jax.policies import Recency
from kvcomp_jax.spec import LayerSpec, Rung, blocks


def one_rung(context: Context, k: Codec, v: Codec, *, num_sinks: int, window: int, block_size: int) -> LayerSpec:
    """One rung for all tokens behind exact sinks and an exact window.

    Tokens wait exactly for at most one block beside the window, because words pack several tokens.
    """
    rung = Rung(k, v, blocks(context.max_len, block_size))
    return LayerSpec(rungs=(rung,), policy=Recency(num_sinks=num_sinks), window=window, block_size=block_size)
