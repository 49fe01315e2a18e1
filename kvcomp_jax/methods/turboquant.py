"""TurboQuant, Zandieh et al. 2025, arXiv:2504.19874."""

from kvcomp_jax.codecs import Codebook, Codec, Rotated, Sketched
from kvcomp_jax.codecs.lloyd_max import sphere_levels
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.methods.rungs import one_rung
from kvcomp_jax.spec import LayerSpec


@method(
    axis="quantise",
    bits="2, 3, 4",
    source="TurboQuant, Zandieh et al. 2025, arXiv:2504.19874",
    advice="As quarot, with levels for a normal distribution instead of ranges; few bits of metadata.",
    settings=("bits=4", "bits=3", "bits=2"),
)
def turboquant(
    context: Context,
    *,
    bits: int = 4,
    k_bits: int | None = None,
    v_bits: int | None = None,
    sketch: bool = False,
    rotations: int = 2,
    seed: int = 0,
    metadata_dtype: str = "float16",
    num_sinks: int = 0,
    window: int = 0,
    block_size: int = 64,
) -> LayerSpec:
    """Rotate rows at random, keep their norms, and quantise coordinates to the best levels for a random unit vector.

    Nothing is calibrated: after the rotation every coordinate has the distribution that the levels were made for. The
    rotation is `rotations` times random signs and a Hadamard matrix, for the paper's random orthogonal one: a single
    time turns a row with one large channel, as keys have, into coordinates of equal size, which at 2 bits fall between
    the levels and lose up to twice as much.
    `sketch=True` is the paper's unbiased quantiser for keys: one bit fewer for the levels, and one for the signs of
    random projections of the residual, with its norm. It is off by default: a bias that all logits share costs softmax
    less than the variance. The paper's fractional widths give some channels a bit more; here `k_bits` and `v_bits` may
    differ instead.
    """
    widths = k_bits or bits, v_bits or bits
    for width in widths:
        if width not in (2, 3, 4):
            raise ValueError(f"bits={width} must be one of 2, 3, 4.")
    if rotations < 1:
        raise ValueError(f"rotations={rotations} must be at least 1.")

    def levels(width: int) -> Codebook:
        codebook = sphere_levels(width, context.layout.head_dim)
        return Codebook(levels=codebook, normalise="rms", metadata_dtype=metadata_dtype)

    k: Codec = levels(widths[0])
    v: Codec = levels(widths[1])
    if sketch:
        k = Sketched(inner=levels(widths[0] - 1), seed=seed, metadata_dtype=metadata_dtype)
    for i in range(rotations):
        k, v = Rotated(inner=k, seed=seed + i), Rotated(inner=v, seed=seed + i)
    return one_rung(context, k, v, num_sinks=num_sinks, window=window, block_size=block_size)
