"""The cases that every backend is checked with: interpreted, compiled ahead of time and on hardware."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case_data import draw_positions, draw_rows, encoded, position_shapes
from pallas_kernels.formats import Format
from pallas_kernels.quantize_pack.reference import quantize_pack

HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `arguments` draws it, `shapes` describes it without arrays."""

    k_format: Format
    v_format: Format
    head_dim: int = 64
    num_kv_heads: int = 3
    rows: int = 3  # query heads of a KV head times query tokens
    num_slots: int = 256
    length: tuple[int, ...] = (256, 100)
    soft_cap: float | None = None
    sliding_window: int | None = None
    positions: str | None = None  # None, "shared" by the heads or "per head": slots with positions, holes among them
    values: str = "normal"  # or "constant" groups, or huge "outliers"
    dtype: str = "float32"  # of q

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        """Positional and keyword arguments of `quantized_decode`."""
        rng = np.random.default_rng(seed)
        batch, heads, slots = len(self.length), self.num_kv_heads, self.num_slots
        q = rng.standard_normal((batch, heads, self.rows, self.head_dim)) * self.head_dim**-0.5
        k, v = (draw_rows(rng, (batch, heads, slots, self.head_dim), self.values) for _ in "kv")
        pos, q_pos = draw_positions(rng, self.positions, (batch, heads, slots), self.rows)
        length = jnp.asarray(np.array(self.length, np.int32))
        keys, values = encoded(jnp.asarray(k), self.k_format), encoded(jnp.asarray(v), self.v_format)
        return (jnp.asarray(q.astype(jnp.dtype(self.dtype))), keys, values, length, pos, q_pos), self.options

    @property
    def options(self) -> dict:
        """Keyword arguments of `quantized_decode`."""
        names = ("k_format", "v_format", "soft_cap", "sliding_window")
        return {name: getattr(self, name) for name in names}

    def shapes(self) -> tuple:
        """The positional arguments as ShapeDtypeStructs; draws nothing, as serving shapes take gigabytes."""
        batch, heads, slots = len(self.length), self.num_kv_heads, self.num_slots
        x = jax.ShapeDtypeStruct((batch, heads, slots, self.head_dim), jnp.float32)
        k, v = (jax.eval_shape(partial(quantize_pack, fmt=fmt), x) for fmt in (self.k_format, self.v_format))
        q = jax.ShapeDtypeStruct((batch, heads, self.rows, self.head_dim), jnp.dtype(self.dtype))
        positions = position_shapes(self.positions, (batch, heads, slots), self.rows)
        return q, k, v, jax.ShapeDtypeStruct((batch,), jnp.int32), *positions


def token(bits: int, group_size: int = 32, **kwargs) -> Format:
    """Scales per token."""
    return Format(bits, "token", group_size, **kwargs)


def channel(bits: int, group_size: int = 32, **kwargs) -> Format:
    """Scales per channel."""
    return Format(bits, "channel", group_size, **kwargs)


CASES = {
    **{f"k{b}-channel-v{b}-token": Case(channel(b), token(b)) for b in (2, 3, 4, 8)},
    **{f"k{b}-token-v{c}-channel": Case(token(b), channel(c)) for b, c in ((2, 4), (3, 8), (4, 2), (8, 3))},
    "k4-channel-v4-channel": Case(channel(4), channel(4)),
    **{
        f"head_dim-{d}": Case(channel(4), token(4, 16 if d == 80 else 32), head_dim=d, num_slots=512, length=(511,))
        for d in HEAD_DIMS
    },
    **{
        f"rows-{r}-heads-{h}": Case(channel(4), token(2), rows=r, num_kv_heads=h)
        for r, h in ((1, 1), (2, 2), (4, 8), (7, 1), (16, 1))
    },
    "lengths": Case(
        channel(2), token(2), num_kv_heads=1, num_slots=1024, length=(0, 1, 31, 32, 33, 511, 512, 513, 1024)
    ),
    "odd-slots": Case(channel(4), token(4), num_slots=32 * 11, length=(345, 7)),
    "one-block": Case(channel(4), token(4), num_slots=32, length=(32,)),
    "group-64": Case(channel(4, 64), token(4, 64), head_dim=128),
    "group-128": Case(channel(2, 128), token(2, 128), head_dim=128),
    "whole-head": Case(token(8, 64), token(8, 64)),
    "whole-head-symmetric": Case(token(8, 64, symmetric=True), token(4, 64, symmetric=True)),
    "symmetric-channel": Case(channel(4, 32, symmetric=True), token(3, 32, symmetric=True)),
    "float32-metadata": Case(channel(4, metadata_dtype="float32"), token(4, metadata_dtype="float32")),
    "bfloat16-query": Case(channel(4), token(4), head_dim=128, dtype="bfloat16"),
    "soft-cap": Case(channel(4), token(4), soft_cap=20.0),
    "positions": Case(channel(4), token(4), positions="shared"),
    "positions-per-head": Case(token(8), token(8), positions="per head"),
    "sliding-window": Case(channel(4), token(4), positions="shared", sliding_window=50),
    "constant": Case(channel(2), token(2), values="constant"),
    "outliers": Case(channel(4), token(4), values="outliers"),
    "split": Case(channel(4), token(4), num_kv_heads=1, num_slots=8192, length=(8000,)),
}

# What the ahead-of-time compilation and the benchmarks measure: every width at a serving shape.
SERVING = {
    f"{k}-{v}-bits{'-head_dim-64' if d == 64 else ''}": Case(
        channel(k),
        token(v),
        head_dim=d,
        num_kv_heads=8 if d == 128 else 3,
        rows=4 if d == 128 else 3,
        num_slots=32768,
        length=(32768,) * 8,
        dtype="bfloat16",
    )
    for (k, v), d in itertools.product(((2, 2), (3, 3), (4, 4), (8, 8), (4, 2)), (64, 128))
}
