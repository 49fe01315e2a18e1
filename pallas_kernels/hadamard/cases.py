"""The cases that every backend is checked with: interpreted, compiled ahead of time and on hardware."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import Format
from pallas_kernels.quantized_decode.cases import channel, token


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `function`; `arguments` draws it, `shapes` describes it without arrays."""

    shape: tuple[int, ...] = (2, 3, 64, 64)
    dtype: str = "float32"
    fmt: Format | None = None  # None: rotation alone

    @property
    def function(self) -> str:
        """Which function of the operation is called."""
        return "hadamard" if self.fmt is None else "rotate_quantize_pack"

    @property
    def options(self) -> dict:
        """Keyword arguments: none."""
        return {}

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        """Positional and keyword arguments of the function."""
        x = np.random.default_rng(seed).standard_normal(self.shape)
        x[..., self.shape[-1] // 3] *= 20  # an outlier channel, what rotation is for
        return self._with(jnp.asarray(x, self.dtype)), self.options

    def shapes(self) -> tuple:
        """The positional arguments with a ShapeDtypeStruct for the array."""
        return self._with(jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype)))

    def _with(self, x) -> tuple:
        return (x,) if self.fmt is None else (x, self.fmt)


CASES = {
    **{f"dim-{d}": Case((3, 40, d)) for d in (1, 2, 12, 16, 20, 28, 36, 40, 64, 80, 96, 112, 128, 256, 512, 576, 1536)},
    "vector": Case((128,)),
    "one-row": Case((1, 64)),
    "odd-rows": Case((3, 1, 77, 128)),
    "many-rows": Case((2, 3, 700, 64)),
    "bfloat16": Case((2, 3, 64, 128), "bfloat16"),
    "bfloat16-80": Case((2, 3, 33, 80), "bfloat16"),
    **{f"quantized-{b}-token": Case(fmt=token(b)) for b in (2, 3, 4, 8)},
    **{f"quantized-{b}-channel": Case(fmt=channel(b)) for b in (2, 3, 4, 8)},
    "quantized-many": Case((1, 2, 32 * 37, 128), fmt=token(4)),
    **{f"quantized-{d}": Case((1, 2, 96, d), fmt=token(4, 16)) for d in (80, 96, 112, 256)},
    "quantized-group-128": Case((1, 2, 256, 128), fmt=channel(2, 128)),
    "quantized-symmetric": Case(fmt=token(4, 64, symmetric=True)),
    "quantized-clipped": Case(fmt=token(4, 64, clip=0.95)),
    "quantized-bfloat16": Case((1, 3, 64, 64), "bfloat16", token(4)),
}

# What the ahead-of-time compilation and the benchmarks measure.
SERVING = {
    **{f"head_dim-{d}": Case((8, 8, 32768, d), "bfloat16") for d in (64, 128)},
    **{f"quantized-4-token-head_dim-{d}": Case((8, 8, 32768, d), "bfloat16", token(4)) for d in (64, 128)},
    "quantized-2-channel-head_dim-128": Case((8, 8, 32768, 128), "bfloat16", channel(2)),
}
