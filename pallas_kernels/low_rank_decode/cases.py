"""The cases that every backend is checked with: interpreted, compiled ahead of time and on hardware."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case_data import draw_positions, draw_rows, encoded, position_shapes, rows_shape
from pallas_kernels.formats import Format
from pallas_kernels.quantized_decode.cases import channel, token


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `arguments` draws it, `shapes` describes it without arrays."""

    k_format: Format | None = None  # None: dense
    v_format: Format | None = None
    k_rank: int = 64
    v_rank: int = 64
    num_kv_heads: int = 3
    rows: int = 3
    num_slots: int = 256
    length: tuple[int, ...] = (256, 100)
    soft_cap: float | None = None
    sliding_window: int | None = None
    positions: str | None = None  # as in `quantized_decode.cases`
    values: str = "normal"  # as in `case_data.draw_rows`
    dtype: str = "float32"  # of q and of dense rows

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        """Positional and keyword arguments of `low_rank_decode`."""
        rng = np.random.default_rng(seed)
        heads = (len(self.length), self.num_kv_heads)
        q = rng.standard_normal((*heads, self.rows, self.k_rank)) * self.k_rank**-0.5
        k = self._rows(draw_rows(rng, (*heads, self.num_slots, self.k_rank), self.values), self.k_format)
        v = self._rows(draw_rows(rng, (*heads, self.num_slots, self.v_rank), self.values), self.v_format)
        pos, q_pos = draw_positions(rng, self.positions, (*heads, self.num_slots), self.rows)
        return (jnp.asarray(q, self.dtype), k, v, jnp.asarray(self.length, jnp.int32), pos, q_pos), self.options

    @property
    def options(self) -> dict:
        """Keyword arguments of `low_rank_decode`."""
        return {name: getattr(self, name) for name in ("k_format", "v_format", "soft_cap", "sliding_window")}

    def shapes(self) -> tuple:
        """The positional arguments as ShapeDtypeStructs; draws nothing, as serving shapes take gigabytes."""
        heads, dtype = (len(self.length), self.num_kv_heads), jnp.dtype(self.dtype)
        k, v = (
            rows_shape((*heads, self.num_slots, rank), dtype, fmt)
            for rank, fmt in ((self.k_rank, self.k_format), (self.v_rank, self.v_format))
        )
        q = jax.ShapeDtypeStruct((*heads, self.rows, self.k_rank), dtype)
        positions = position_shapes(self.positions, (*heads, self.num_slots), self.rows)
        return q, k, v, jax.ShapeDtypeStruct(heads[:1], jnp.int32), *positions

    def _rows(self, x: np.ndarray, fmt: Format | None):
        return jnp.asarray(x, self.dtype) if fmt is None else encoded(jnp.asarray(x), fmt)


CASES = {
    **{f"dense-ranks-{r}-{s}": Case(k_rank=r, v_rank=s) for r, s in ((16, 16), (32, 48), (64, 128), (128, 80))},
    **{f"quantized-{b}": Case(channel(b), token(b), k_rank=64, v_rank=96) for b in (2, 3, 4, 8)},
    "by-token": Case(token(4), channel(4)),
    "small-groups": Case(channel(4), token(4, 16), k_rank=16, v_rank=48),
    "dense-keys": Case(None, token(4)),
    "dense-values": Case(channel(4), None),
    "bfloat16": Case(dtype="bfloat16"),
    "lengths": Case(num_kv_heads=1, num_slots=1056, length=(0, 1, 31, 33, 511, 512, 513, 1024, 1056)),
    "odd-slots": Case(num_slots=77, length=(77, 5)),
    "soft-cap": Case(soft_cap=20.0),
    "positions": Case(positions="shared"),
    "positions-per-head": Case(token(8), token(8), positions="per head"),
    "sliding-window": Case(positions="shared", sliding_window=50),
    "constant": Case(channel(2), token(2), values="constant"),
    "outliers": Case(channel(4), token(4), values="outliers"),
    **{f"rows-{r}-heads-{h}": Case(rows=r, num_kv_heads=h) for r, h in ((1, 1), (4, 8), (16, 2))},
}

# What the ahead-of-time compilation and the benchmarks measure.
SERVING = {
    f"rank-{r}-{'bits-4' if quantized else 'bfloat16'}": Case(
        channel(4) if quantized else None,
        token(4) if quantized else None,
        k_rank=r,
        v_rank=r,
        num_kv_heads=8,
        rows=4,
        num_slots=32768,
        length=(32768,) * 8,
        dtype="bfloat16",
    )
    for r in (32, 64, 128)
    for quantized in (False, True)
}
