"""The cases that every backend is checked with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case_data import draw_positions, position_shapes
from pallas_kernels.codebook_decode.rows import CodebookRows


@dataclasses.dataclass(frozen=True)
class Side:
    """How keys or values are stored."""

    bits: int = 3
    scales: int = 0  # numbers a token: none, a scale, or a scale and a zero point
    outliers: int = 0
    by_channel: bool = False  # a scale and zero point a channel
    rope: float = 0.0  # share of the channels that rotate

    def shapes(self, batch: int, heads: int, slots: int, dim: int, joined: bool) -> CodebookRows:
        """Rows as ShapeDtypeStructs."""
        rows, channels = ((batch, 1), heads * dim) if joined else ((batch, heads), dim)

        def array(exists: bool, dtype: str, *shape: int):
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) if exists else None

        kept = (*rows, slots, self.outliers)
        index = "uint8" if channels <= 256 else "uint16"
        return CodebookRows(
            codes=array(True, "uint32", *rows, slots * self.bits // 32, channels),
            levels=array(True, "float32", 2**self.bits),
            scale=array(self.scales > 0, "float16", *rows, slots),
            zero_point=array(self.scales > 1, "float16", *rows, slots),
            outliers=array(self.outliers > 0, "float16", *kept),
            outlier_channels=array(self.outliers > 0, index, *kept),
            channel_scale=array(self.by_channel, "float32", batch, heads, dim),
            channel_zero_point=array(self.by_channel, "float32", batch, heads, dim),
            rope=array(self.rope > 0, "float32", 2, int(self.rope * dim) // 2),
        )

    def draw(self, rng: np.random.Generator, shapes: CodebookRows) -> CodebookRows:
        """Rows of these shapes: any words are codes."""
        channels, normal = shapes.codes.shape[-1], rng.standard_normal
        num_pairs = 0 if shapes.rope is None else shapes.rope.shape[1]
        frequency = 10000.0 ** -(np.arange(num_pairs) / max(num_pairs, 1))
        draws = {
            "codes": lambda shape: rng.integers(0, 2**32, shape, np.uint32),
            "levels": lambda shape: np.sort(normal(shape)),
            "scale": lambda shape: rng.uniform(0.5, 1.5, shape),
            "zero_point": lambda shape: 0.3 * normal(shape),
            "outliers": lambda shape: 4 * normal(shape),
            "outlier_channels": lambda shape: rng.permuted(np.broadcast_to(np.arange(channels), (*shape[:3], channels)),
                                                           axis=-1)[..., : shape[3]],
            "channel_scale": lambda shape: rng.uniform(0.5, 1.5, shape),
            "channel_zero_point": lambda shape: normal(shape),
            "rope": lambda shape: np.stack([frequency, np.full(shape[1], 1.1)]),
        }  # fmt: skip
        shaped = shapes._asdict().items()
        return CodebookRows(
            **{name: x if x is None else jnp.asarray(draws[name](x.shape).astype(x.dtype)) for name, x in shaped}
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `arguments` draws it, `shapes` describes it without arrays."""

    k: Side = Side()
    v: Side = Side()
    head_dim: int = 64
    num_kv_heads: int = 3
    rows: int = 3  # query heads of a KV head times query tokens
    num_slots: int = 256
    length: tuple[int, ...] = (256, 100)
    joined: bool = True
    soft_cap: float | None = None
    sliding_window: int | None = None
    positions: str | None = "in order"  # None, "in order", or with holes and "shared" by the heads or "per head"
    dtype: str = "float32"  # of q

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        """Positional and keyword arguments of `codebook_decode`."""
        rng = np.random.default_rng(seed)
        q, k, v, _, pos, q_pos = self.shapes()
        drawn = jnp.asarray((rng.standard_normal(q.shape) * self.head_dim**-0.5).astype(q.dtype))
        k, v = self.k.draw(rng, k), self.v.draw(rng, v)
        if self.positions == "in order":
            first = 5 + 1000 * np.arange(len(self.length))[:, None, None]  # rows stand at places of their own
            pos = jnp.asarray(first + np.arange(self.num_slots), jnp.int32)
            q_pos = jnp.broadcast_to(pos[:, :, -1], q_pos.shape)
        else:
            pos, q_pos = draw_positions(rng, self.positions, (*q.shape[:2], self.num_slots), self.rows)
        return (drawn, k, v, jnp.asarray(self.length, jnp.int32), pos, q_pos), self.options

    @property
    def options(self) -> dict:
        """Keyword arguments of `codebook_decode`."""
        return {"soft_cap": self.soft_cap, "sliding_window": self.sliding_window}

    def shapes(self) -> tuple:
        """The positional arguments as ShapeDtypeStructs."""
        batch, heads = len(self.length), self.num_kv_heads
        q = jax.ShapeDtypeStruct((batch, heads, self.rows, self.head_dim), jnp.dtype(self.dtype))
        k, v = (x.shapes(batch, heads, self.num_slots, self.head_dim, self.joined) for x in (self.k, self.v))
        positions = position_shapes(self.positions, (batch, heads, self.num_slots), self.rows)
        return q, k, v, jax.ShapeDtypeStruct((batch,), jnp.int32), *positions


def keys(bits: int = 3, outliers: int = 2, rope: float = 1.0) -> Side:
    """Keys per channel, before their rotation."""
    return Side(bits, outliers=outliers, by_channel=True, rope=rope)


def values(bits: int = 3, outliers: int = 2) -> Side:
    """Values with a range a token."""
    return Side(bits, scales=2, outliers=outliers)


PLAIN = Side(bits=4, scales=1)
CASES = {
    **{f"bits-{b}": Case(keys(b), values(b)) for b in (2, 3, 4)},
    "bits-4-2": Case(keys(4), values(2)),
    "heads-apart": Case(keys(), values(), joined=False),
    "no-outliers": Case(keys(outliers=0), values(outliers=0)),
    "no-rope": Case(keys(rope=0), values(), positions=None),
    "partial-rope": Case(keys(rope=0.5), values()),
    "scale-a-token": Case(PLAIN, PLAIN, joined=False, positions=None),
    "levels-alone": Case(positions=None),
    "one-side-rich": Case(Side(2), values(4, 6), positions=None),
    **{
        f"head_dim-{d}": Case(keys(), values(), head_dim=d, num_kv_heads=2, num_slots=512, length=(511,))
        for d in (80, 96, 128)
    },
    "head_dim-256-apart": Case(keys(4), values(4), head_dim=256, num_kv_heads=1, length=(130,)),
    "head_dim-40-no-rope": Case(keys(rope=0), values(), head_dim=40),
    **{f"rows-{r}-heads-{h}": Case(keys(), values(), rows=r, num_kv_heads=h) for r, h in ((1, 1), (8, 2), (16, 1))},
    "many-outliers": Case(keys(outliers=12), values(outliers=12), num_kv_heads=5),
    "lengths": Case(
        keys(2), values(2), num_kv_heads=1, num_slots=1024, length=(0, 1, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1024)
    ),
    "odd-slots": Case(keys(), values(), num_slots=32 * 11, length=(345, 7)),
    "one-block": Case(keys(), values(), num_slots=32, length=(32,)),
    "bfloat16-query": Case(keys(), values(), head_dim=128, dtype="bfloat16"),
    "soft-cap": Case(keys(), values(), soft_cap=20.0),
    "holes": Case(keys(), values(), positions="shared"),
    "holes-per-head": Case(keys(), values(), joined=False, positions="per head"),
    "sliding-window": Case(keys(), values(), sliding_window=50),
    "split": Case(keys(4), values(4), num_kv_heads=1, num_slots=8192, length=(8000,)),
}

# What the ahead-of-time compilation measures: 1 % of the values are outliers.
SERVING = {
    f"bits-{b}-head_dim-{d}": Case(
        keys(b, m), values(b, m), d, heads, rows, num_slots=32768, length=(32768,) * 8, dtype="bfloat16"
    )
    for b, d, heads, rows, m in ((3, 64, 3, 3, 2), (2, 128, 8, 4, 12), (3, 128, 8, 4, 12), (4, 128, 8, 4, 12))
}
