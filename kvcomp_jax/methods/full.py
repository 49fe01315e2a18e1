"""No compression: one exact rung."""

from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.spec import LayerSpec, blocks, exact_rung


@method(
    axis="none",
    bits="16 or 32",
    source="the baseline",
    advice="The reference, and the choice where memory is no concern.",
)
def full(context: Context, *, block_size: int = 64) -> LayerSpec:
    """Keep every token exactly: a ladder with one exact rung."""
    return LayerSpec(rungs=(exact_rung(blocks(context.max_len, block_size)),), block_size=block_size)
