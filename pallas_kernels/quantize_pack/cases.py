"""The cases that every backend is checked with: interpreted, compiled ahead of time and on hardware."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import Format


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `arguments` draws it, `shapes` describes it without arrays."""

    fmt: Format
    shape: tuple[int, ...] = (2, 3, 128, 64)
    dtype: str = "float32"
    values: str = "normal"  # or "constant" groups, or huge "outliers"

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        """Positional and keyword arguments of `quantize_pack`."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(self.shape).astype(np.float32)
        if self.values == "constant":
            x[:] = 1.5
        elif self.values == "outliers":
            x *= np.where(rng.random(self.shape) < 0.01, 1e6, 1)
        return (jnp.asarray(x, self.dtype), self.fmt), {}

    def shapes(self) -> tuple:
        """The positional arguments with a ShapeDtypeStruct for the array."""
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype)), self.fmt


def _format(bits: int, axis: str, group_size: int = 32, **kwargs) -> Format:
    return Format(bits, axis, group_size, **kwargs)  # type: ignore[arg-type]


CASES = {
    **{f"{axis}-{bits}": Case(_format(bits, axis)) for axis in ("token", "channel") for bits in (2, 3, 4, 8)},
    **{
        f"head_dim-{d}-{axis}": Case(_format(4, axis, 16 if axis == "token" else 32), (1, 2, 64, d))
        for d in (80, 96, 128, 256)
        for axis in ("token", "channel")
    },
    "one-block-token": Case(_format(4, "token"), (3, 1, 32, 64)),
    "one-block-channel": Case(_format(2, "channel"), (1, 1, 32, 64)),
    "odd-blocks": Case(_format(4, "channel"), (1, 3, 32 * 7, 64)),
    "group-64": Case(_format(4, "channel", 64), (1, 2, 192, 128)),
    "group-128": Case(_format(2, "channel", 128), (1, 2, 256, 128)),
    "whole-head": Case(_format(8, "token", 64), (2, 2, 77, 64)),
    "symmetric-token": Case(_format(8, "token", 64, symmetric=True)),
    "symmetric-channel": Case(_format(4, "channel", 32, symmetric=True)),
    "clipped-token": Case(_format(4, "token", clip=0.9)),
    "clipped-channel": Case(_format(2, "channel", clip=0.9)),
    "clipped-symmetric": Case(_format(8, "token", 64, symmetric=True, clip=0.9)),
    "float32-metadata": Case(_format(4, "channel", metadata_dtype="float32")),
    "bfloat16-token": Case(_format(4, "token"), dtype="bfloat16"),
    "bfloat16-channel": Case(_format(2, "channel"), dtype="bfloat16"),
    "constant": Case(_format(4, "channel"), values="constant"),
    "outliers": Case(_format(4, "token"), values="outliers"),
    "outliers-channel": Case(_format(2, "channel"), values="outliers"),
}

# What the ahead-of-time compilation and the benchmarks measure.
SERVING = {
    f"{axis}-{bits}-bits-head_dim-{d}": Case(_format(bits, axis), (8, 8 if d == 128 else 3, 32768, d), "bfloat16")
    for axis in ("token", "channel")
    for bits in (2, 3, 4, 8)
    for d in ((64, 128) if bits == 4 else (128,))
} | {
    # What one row of a small model lets settle: an odd number of units.
    f"{axis}-4-bits-one-block": Case(_format(4, axis), (1, 3, 32, 64), "bfloat16")
    for axis in ("token", "channel")
}
