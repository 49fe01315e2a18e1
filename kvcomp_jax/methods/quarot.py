"""QuaRot, Ashkboos et al. 2024, arXiv:2404.00456."""

from kvcomp_jax.codecs import Affine, Codec, Rotated
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Recency
from kvcomp_jax.spec import LayerSpec, Rung, blocks


@method(
    axis="quantise",
    bits="2, 3, 4, 8",
    source="QuaRot, Ashkboos et al. 2024, arXiv:2404.00456",
    advice="3 or 4 bits without calibration and almost without an exact window; also where single channels are loud.",
    settings=("bits=4", "bits=3", "bits=2"),
)
def quarot(
    context: Context,
    *,
    bits: int = 4,
    k_bits: int | None = None,
    v_bits: int | None = None,
    group_size: int | None = None,
    clip: float = 0.95,
    symmetric: bool = False,
    seed: int | None = None,
    rotate_v: bool = True,
    num_sinks: int = 0,
    window: int = 0,
) -> LayerSpec:
    """Rotate keys and values by a Hadamard matrix and quantise them per token and head, without calibration.

    Prompts are attended to exactly. Keys are rotated after RoPE. Defaults are the paper's: asymmetric, one group a
    token and head, both ends of its range times 0.95, no residual window. A decoded token is quantised there at once;
    here when the tokens that share its words are there: 8 at 4 bits, 16 at 2, 32 at 3, so that fewer than twice as many
    wait exactly, the newest ones. Its codes are the same, since they depend on the token alone.
    `rotate_v=False` is for models whose weights give rotated values already, see `models.rotation`.
    """
    plain_k, plain_v = (
        Affine(bits=b or bits, axis="token", group_size=group_size, symmetric=symmetric, clip=clip)
        for b in (k_bits, v_bits)
    )
    k = Rotated(inner=plain_k, seed=seed)
    v: Codec = Rotated(inner=plain_v, seed=seed) if rotate_v else plain_v
    block_size = Rung(k, v, 1).unit
    rung = Rung(k, v, blocks(context.max_len, block_size))
    return LayerSpec(rungs=(rung,), policy=Recency(num_sinks=num_sinks), window=window, block_size=block_size)
