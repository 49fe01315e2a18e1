"""How rotated and quantised rows of two backends are compared.

Rotations sum in their own order and round apart, and where a value lies between two codes they take one each: codes may
differ by one, and few do.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.quantize_pack.reference import dequantize

MOST_APART = 1.3  # codes: one, and an ulp of float16 in a scale
LARGEST_SHARE = 2e-3  # of codes one apart


def codes_apart(got: Quantized, want: Quantized, fmt: Format) -> tuple[float, float]:
    """Most codes that rows lie apart once decoded, and the share that lies a code or more apart.

    Infinity and 1 if shapes or dtypes differ or a value is not finite.
    """
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), rows) for rows in (got, want)]
    if kinds[0] != kinds[1]:
        return float("inf"), 1.0
    difference = dequantize(got, fmt) - dequantize(want, fmt)
    scale = jnp.expand_dims(want.scale.astype(jnp.float32), fmt.group_axis)
    apart = jnp.abs(fmt.split(difference)) / scale
    apart = jnp.where(jnp.isfinite(apart), apart, jnp.inf)
    return float(apart.max()), float((apart > 0.7).mean())


def same_rows(got: Quantized, want: Quantized, fmt: Format) -> bool:
    """Whether rows differ by ties alone."""
    most, share = codes_apart(got, want, fmt)
    return most < MOST_APART and share < LARGEST_SHARE
