"""KVComp, Jiang et al. 2025, arXiv:2509.00579."""

from kvcomp_jax.codecs import AcrossHeads, Bounded, Codec, Entropy, Identity, PreRope
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Recency
from kvcomp_jax.spec import LayerSpec, Rung, blocks


@method(
    axis="quantise",
    bits="2 to 4, as data need",
    source="KVComp, Jiang et al. 2025, arXiv:2509.00579",
    advice="A bound on every error, and as many bits as that takes; k_axis=channel where single channels are loud.",
    settings=("", "across_heads=true", "k_axis=channel,k_rel_scale=0.25"),
)
def kvcomp(
    context: Context,
    *,
    k_rel_scale: float = 0.05,
    v_rel_scale: float = 0.10,
    k_axis: str = "block",
    pre_rope: bool = False,
    v_axis: str = "token",
    block_size: int = 64,
    k_recent: int = 128,
    v_recent: int = 256,
    k_budget: float | None = 3.5,
    v_budget: float | None = 3.5,
    across_heads: bool = False,
    num_sinks: int = 0,
) -> LayerSpec | tuple[LayerSpec, ...]:
    """Quantise by a step relative to the range, keys per block and values per token, and Huffman-code the codes.

    Defaults are the paper's; "channel" keys at k_rel_scale=0.25 are its other preset. Buffers are the paper's, too: as
    many exact keys as `k_recent` - 64 to `k_recent` - 1, and exact values between `v_recent` - 128 and `v_recent` - 1;
    values leave 64 at a time instead of 128, which changes no code, as their steps are their own token's.
    Budgets are bits a value that slots have room for, metadata aside (see `Budgeted`); None never coarsens a step. The
    paper allocates as it goes; its ratios ask for 3.4 and 2.8 bits of payload. Twice the step takes about a bit less:
    wider steps want smaller budgets, as 3.0 and 2.9375 for its preset of 0.07 and 0.14. `pre_rope=True` stores keys as
    they were before RoPE, an option of its code, which suits "channel" keys with large blocks. Ranges and tables are a
    head's; with across_heads=True they span all heads, as in the paper, which takes fewer bits and has no fused read.
    """
    if k_recent < block_size or v_recent < k_recent:
        raise ValueError(f"need v_recent={v_recent} >= k_recent={k_recent} >= block_size={block_size}.")
    window = k_recent - block_size
    waiting = -(-max(v_recent - 2 * block_size - window, 0) // block_size) * block_size
    k: Codec = Entropy(inner=_bounded(k_rel_scale, k_axis, block_size), budget=k_budget, block=block_size)
    v: Codec = Entropy(
        inner=_bounded(v_rel_scale, v_axis, block_size), budget=v_budget, block=block_size, along="channel"
    )
    if across_heads:
        k, v = (AcrossHeads(inner=codec, num_heads=context.layout.num_kv_heads) for codec in (k, v))

    def spec(keys: Codec) -> LayerSpec:
        rest = Rung(keys, v, blocks(context.max_len - window - waiting, block_size))
        rungs = (Rung(keys, Identity(), waiting), rest) if waiting else (rest,)
        return LayerSpec(rungs=rungs, policy=Recency(num_sinks=num_sinks), window=window, block_size=block_size)

    ropes = [context.layout.rope(i, context.max_len) if pre_rope else None for i in range(context.layout.num_layers)]
    return tuple(spec(k if rope is None else PreRope(inner=k, rope=rope)) for rope in ropes)


def _bounded(rel_scale: float, axis: str, block_size: int) -> Bounded:
    """A byte holds the zero bin but for channels, whose values may lie far from zero for their range."""
    group_size = None if axis == "token" else block_size
    zero_dtype = "int16" if axis == "channel" else "int8"
    return Bounded(rel_scale=rel_scale, axis=axis, group_size=group_size, zero_dtype=zero_dtype)  # type: ignore[arg-type]
