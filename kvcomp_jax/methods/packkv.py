"""PackKV, Jiang et al. 2025, arXiv:2512.24449."""

from kvcomp_jax.codecs import AcrossHeads, Bounded, Codec, Packs
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.orders import Alike
from kvcomp_jax.policies import Recency
from kvcomp_jax.spec import LayerSpec, Rung, blocks


@method(
    axis="quantise",
    bits="1 to 4, as data need",
    source="PackKV, Jiang et al. 2025, arXiv:2512.24449",
    advice="As kvcomp, with packs that are read without a serial walk, for a few more bits.",
    settings=("", "across_heads=true", "across_heads=true,k_rel_scale=0.06,v_rel_scale=0.12"),
)
def packkv(
    context: Context,
    *,
    k_rel_scale: float = 0.1,
    v_rel_scale: float = 0.2,
    repack: str = "greedy",
    pack: int = 16,
    block_size: int = 64,
    recent: int = 192,
    k_budget: float | None = 3.0,
    v_budget: float | None = 2.75,
    across_heads: bool = False,
    num_sinks: int = 0,
) -> LayerSpec:
    """Quantise per token by a step relative to its range, and pack 16 alike tokens of a channel by their own width.

    Defaults are the paper's, with `recent` - 64 to `recent` - 1 exact tokens. `repack` is "greedy", "median" or "none".
    Budgets are bits a value that slots have room for, metadata aside (see `Budgeted`); None never coarsens a step.
    Ranges and orders are a head's; with across_heads=True they span all heads, as in the paper, which takes fewer bits
    for the same error where heads differ in range, and has no fused read.
    """
    if recent < block_size:
        raise ValueError(f"recent={recent} must be at least block_size={block_size}.")
    window = recent - block_size

    def codec(rel_scale: float, budget: float | None) -> Codec:
        packs = Packs(inner=Bounded(rel_scale=rel_scale, axis="token"), budget=budget, block=block_size, pack=pack)
        return AcrossHeads(inner=packs, num_heads=context.layout.num_kv_heads) if across_heads else packs

    order = None if repack == "none" else Alike(repack)  # type: ignore[arg-type]
    k, v = codec(k_rel_scale, k_budget), codec(v_rel_scale, v_budget)
    rung = Rung(k, v, blocks(context.max_len - window, block_size), order=order)
    return LayerSpec(rungs=(rung,), policy=Recency(num_sinks=num_sinks), window=window, block_size=block_size)
