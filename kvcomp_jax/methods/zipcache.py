"""ZipCache, He et al. 2024, arXiv:2405.14256."""

from typing import NamedTuple

from kvcomp_jax.codecs import AcrossHeads, Affine, ChannelScaled, Codec
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Recency, Saliency
from kvcomp_jax.spec import LayerSpec, Rung, blocks


class _Class(NamedTuple):
    """Tokens of one precision in each block."""

    bits: int
    tokens: int


@method(
    axis="quantise",
    bits="4 and 2",
    source="ZipCache, He et al. 2024, arXiv:2405.14256",
    advice="Between 2 and 4 bits where a few tokens matter most; it ranks them by probes of the prompt.",
    settings=("", "low_share=0.7", "bits=8,low_bits=4,low_share=0.5"),
)
def zipcache(
    context: Context,
    *,
    bits: int = 4,
    low_bits: int = 2,
    low_share: float = 0.4,
    recent: float = 0.05,
    random: float = 0.05,
    divide_by: str = "probes",
    across_heads: bool = False,
    block_size: int | None = None,
    num_sinks: int = 0,
    window: int = 0,
    metadata_dtype: str = "float16",
) -> LayerSpec:
    """Store salient tokens at `bits` and the `low_share` of tokens that matter least at `low_bits`.

    Keys: a range a channel, for the tokens of a class in a block. Values: channels divided by factors of the row's
    prompt, then a range a token and head. Saliency comes from probe rows in a prompt, and while decoding from all
    queries since the token came; a block of `block_size` tokens is divided when it fills and never quantised again.
    Defaults are the paper's: 4 and 2 bits, 60 % salient, 5 % recent and 5 % random probes; blocks of 80 for the paper's
    100, the nearest that gives both classes whole words (120 is as near, and waits longer). A prompt's last tokens,
    fewer than a block, wait in the window.
    Differences from the released code: ranges of keys are a block's, where there one range a class is widened every
    100 tokens and all is quantised again, which adds up errors (`block_size` = the prompt's length gives one range a
    class); ranges of values are a head's, there they span all heads, as with across_heads=True, which saves metadata
    and has no fused read; nothing is pooled over the batch.
    Other presets: `low_share=0.7`; `bits=8,low_bits=4,low_share=0.5`.
    """
    size, classes = _classes(bits, low_bits, low_share, block_size)
    num_blocks = blocks(context.max_len, size) // size
    rungs, left = [], size
    for kind in classes:
        k = Affine(bits=kind.bits, axis="channel", group_size=kind.tokens, metadata_dtype=metadata_dtype)
        v: Codec = ChannelScaled(inner=Affine(bits=kind.bits, axis="token", metadata_dtype=metadata_dtype))
        v = AcrossHeads(inner=v, num_heads=context.layout.num_kv_heads) if across_heads else v
        rungs.append(Rung(k, v, kind.tokens * num_blocks, share=kind.tokens / left))
        left -= kind.tokens
    if len(rungs) == 1:
        return LayerSpec(rungs=tuple(rungs), policy=Recency(num_sinks=num_sinks), window=window, block_size=size)
    policy = Saliency(recent=recent, random=random, divide_by=divide_by, num_sinks=num_sinks)
    return LayerSpec(rungs=tuple(rungs), policy=policy, window=window, block_size=size)


def _classes(bits: int, low_bits: int, low_share: float, block_size: int | None) -> tuple[int, list[_Class]]:
    """Tokens of a block, by default near 100, and how they divide into whole words of each class."""
    if not 0 <= low_share <= 1:
        raise ValueError(f"low_share={low_share} must be in [0, 1].")
    fine = Affine(bits=bits, axis="token").unit
    coarse = Affine(bits=low_bits, axis="token").unit
    near = sorted(range(1, 513), key=lambda size: abs(size - 100))
    fitting = [size for size in near if _divides(size, low_share, fine, coarse)]
    if block_size is None and fitting:
        block_size = fitting[0]
    if block_size is None or not _divides(block_size, low_share, fine, coarse):
        raise ValueError(
            f"low_share={low_share} of block_size={block_size} must be a multiple of {coarse} tokens, and the others "
            f"one of {fine}, those that share words; {fitting[0] if fitting else 'low_share=0.4'} would do."
        )
    low = round(low_share * block_size)
    return block_size, [kind for kind in (_Class(bits, block_size - low), _Class(low_bits, low)) if kind.tokens]


def _divides(size: int, low_share: float, fine: int, coarse: int) -> bool:
    low = round(low_share * size)
    whole = abs(low - low_share * size) < 1e-6 and low % coarse == 0 and (size - low) % fine == 0
    return size > 0 and whole
