"""The cases that every backend is checked with: interpreted, compiled ahead of time and on hardware."""

import dataclasses

import jax

from pallas_kernels.homomorphic_decode.partitions import code_sums, sums_dtype
from pallas_kernels.quantized_decode import cases as quantized
from pallas_kernels.quantized_decode.cases import HEAD_DIMS, channel, token

_code_sums = jax.jit(code_sums, static_argnums=1)


@dataclasses.dataclass(frozen=True)
class Case(quantized.Case):
    """One call: a case of `quantized_decode` and the sums of its codes."""

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        """Positional and keyword arguments of `homomorphic_decode`."""
        (q, k, v, *rest), options = super().arguments(seed)
        return (q, k, v, _code_sums(k, self.k_format), _code_sums(v, self.v_format), *rest), options

    def shapes(self) -> tuple:
        """The positional arguments as ShapeDtypeStructs."""
        q, k, v, *rest = super().shapes()
        pairs = ((k, self.k_format), (v, self.v_format))
        sums = (jax.ShapeDtypeStruct(x.scale.shape, sums_dtype(fmt)) for x, fmt in pairs)
        return q, k, v, *sums, *rest


CASES = {
    **{f"k{b}-v{b}": Case(token(b, 64), channel(b, 64)) for b in (2, 3, 4, 8)},
    "k4-v2": Case(token(4, 32), channel(2, 64)),
    **{
        f"head_dim-{d}": Case(token(2, 16 if d == 80 else 32), channel(2), head_dim=d, num_slots=512, length=(511,))
        for d in HEAD_DIMS
    },
    **{
        f"rows-{r}-heads-{h}": Case(token(2, 64), channel(2, 64), rows=r, num_kv_heads=h)
        for r, h in ((1, 1), (4, 8), (7, 1), (16, 1))
    },
    "lengths": Case(
        token(2, 64),
        channel(2, 32),
        num_kv_heads=1,
        num_slots=1024,
        length=(0, 1, 31, 32, 33, 511, 512, 513, 1024),
    ),
    "odd-slots": Case(token(2), channel(2), num_slots=32 * 11, length=(345, 7)),
    "many-odd-slots": Case(token(2), channel(2, 64), num_slots=64 * 11, num_kv_heads=1, length=(700, 600)),
    "group-128": Case(token(2, 128), channel(2, 128), head_dim=128),
    "symmetric": Case(token(8, 64, symmetric=True), channel(4, 32, symmetric=True)),
    "float32-metadata": Case(token(4, metadata_dtype="float32"), channel(4, metadata_dtype="float32")),
    "bfloat16-query": Case(token(2, 64), channel(2, 64), head_dim=128, dtype="bfloat16"),
    "soft-cap": Case(token(2), channel(2), soft_cap=20.0),
    "positions": Case(token(2), channel(2), positions="shared"),
    "positions-per-head": Case(token(8), channel(8), positions="per head"),
    "sliding-window": Case(token(2), channel(2), positions="shared", sliding_window=50),
    "constant": Case(token(2), channel(2), values="constant"),
    "outliers": Case(token(4), channel(4), values="outliers"),
}

# What the ahead-of-time compilation and the benchmarks measure.
SERVING = {
    f"bits-{b}-group-{g}-head_dim-{d}": Case(
        token(b, min(g, d)),
        channel(b, g),
        head_dim=d,
        num_kv_heads=8 if d == 128 else 3,
        rows=4 if d == 128 else 3,
        num_slots=32768,
        length=(32768,) * 8,
        dtype="bfloat16",
    )
    for b in (2, 4)
    for g in (64, 128)
    for d in (64, 128)
}
