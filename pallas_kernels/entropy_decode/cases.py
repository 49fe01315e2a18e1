"""The cases that every backend is checked with."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case_data import draw_positions, position_shapes
from pallas_kernels.entropy_decode import planes, streams
from pallas_kernels.entropy_decode.canonical import code_lengths
from pallas_kernels.entropy_decode.formats import PlaneFormat, Planes, StreamFormat, Streams
from pallas_kernels.entropy_decode.rows import RowFormat

_write_planes = jax.jit(planes.write, static_argnums=(1, 2))  # op by op, each operation would compile alone
_write_streams = jax.jit(streams.write, static_argnums=(3, 4))
_code_lengths = jax.jit(code_lengths, static_argnums=1)
_with_plain = jax.jit(streams.with_plain, static_argnums=1)


@dataclasses.dataclass(frozen=True)
class Side:
    """How keys or values are stored."""

    storage: str  # streams along "token" or "channel", or "planes"
    scales: str = "token"  # a scale a "token", "channel" and block, "block", or two a token: "groups"
    num_levels: int = 22
    block: int = 64
    spread: float = 3.0  # standard deviation of codes
    room: float = 3.5  # bits of a value that a slot of a serving shape has room for
    pack: int = 16  # tokens of a pack of planes

    def format(self, head_dim: int) -> RowFormat:
        """The format of rows of `head_dim`."""
        bits = (self.num_levels - 1).bit_length()
        if self.storage == "planes":
            return PlaneFormat(self.block, head_dim, self.pack, bits)
        return StreamFormat(self.block, head_dim, self.storage, max(8, bits + 2), bits)  # type: ignore[arg-type]

    def draw(self, rng: np.random.Generator, shape: tuple[int, int, int, int]) -> tuple:
        """Rows of `shape` [B, K, S, D], and the tables of streams."""
        heads, slots, head_dim = shape[:2], shape[2], shape[3]
        fmt = self.format(head_dim)
        drawn = rng.normal(self.num_levels / 2, self.spread, shape).round().clip(0, self.num_levels - 1)
        codes = jnp.asarray(drawn.astype(np.uint8))
        steps = rng.uniform(0.1, 0.3, (*heads, *self._scales(slots, head_dim))).astype(np.float32)
        lowest = -steps * np.float32(self.num_levels / 2) + rng.normal(size=steps.shape).astype(np.float32)
        scale, zero_point = jnp.asarray(steps), jnp.asarray(lowest)
        if isinstance(fmt, PlaneFormat):
            room = fmt.num_packs * fmt.code_bits
            return Planes(*_write_planes(codes, room, fmt), scale, zero_point), None  # type: ignore[call-arg]
        weights = rng.integers(1, 1000, (32, self.num_levels))  # one shape for all cases: one compilation
        tables = _code_lengths(jnp.asarray(weights.astype(np.int32)), fmt.max_bits)
        lengths = _with_plain(tables[: 2 * heads[0] * heads[1]].reshape(*heads, 2, -1), fmt)
        choice = jnp.asarray(rng.integers(0, 3, (*heads, slots // self.block)).astype(np.uint8))
        room = -(-fmt.num_streams * fmt.stream * fmt.max_bits // 32) + fmt.num_streams
        written = _write_streams(codes, lengths, choice, room, fmt)
        return Streams(*written, choice, scale, zero_point), lengths  # type: ignore[call-arg]

    def shapes(self, shape: tuple[int, int, int, int]) -> tuple:
        """What `draw` returns as ShapeDtypeStructs; a slot has room for `room` bits a value."""
        (*heads, slots, head_dim), fmt = shape, self.format(shape[-1])
        units, values = (*heads, slots // self.block), self.block * head_dim
        scale: Any = jax.ShapeDtypeStruct((*heads, *self._scales(slots, head_dim)), jnp.float32)

        def array(n: int, dtype: str) -> Any:
            return jax.ShapeDtypeStruct((*units, n), jnp.dtype(dtype))

        if isinstance(fmt, PlaneFormat):
            stored = array(int(self.room * fmt.num_packs), f"uint{self.pack}"), array(fmt.head_bytes, "uint8")
            return Planes(*stored, scale, scale), None
        lengths = jax.ShapeDtypeStruct((*heads, 3, self.num_levels), jnp.uint8)
        stored = array(int(self.room * values) // 32, "uint32"), array(fmt.num_streams, "uint8")
        choice: Any = jax.ShapeDtypeStruct(units, jnp.uint8)
        return Streams(*stored, choice, scale, scale), lengths

    def _scales(self, slots: int, head_dim: int) -> tuple[int, int]:
        """Rows and columns of scales."""
        return {
            "token": (slots, 1),
            "groups": (slots, 2),
            "channel": (slots // self.block, head_dim),
            "block": (slots // self.block, 1),
        }[self.scales]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `arguments` draws it."""

    k: Side = Side("token", "block")
    v: Side = Side("channel", "token", num_levels=12, spread=2.0)
    head_dim: int = 64
    num_kv_heads: int = 3
    rows: int = 3  # query heads of a KV head times query tokens
    num_slots: int = 256
    length: tuple[int, ...] = (256, 100)
    soft_cap: float | None = None
    sliding_window: int | None = None
    positions: str | None = None  # None, "shared" by the heads or "per head"
    dtype: str = "float32"  # of q

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        """Positional and keyword arguments of `entropy_decode`."""
        rng = np.random.default_rng(seed)
        shape = (len(self.length), self.num_kv_heads, self.num_slots, self.head_dim)
        q = rng.standard_normal((*shape[:2], self.rows, self.head_dim)) * self.head_dim**-0.5
        k, k_lengths = self.k.draw(rng, shape)
        v, v_lengths = self.v.draw(rng, shape)
        pos, q_pos = draw_positions(rng, self.positions, shape[:3], self.rows)
        length = jnp.asarray(np.array(self.length, np.int32))
        return (
            jnp.asarray(q.astype(jnp.dtype(self.dtype))),
            k,
            v,
            k_lengths,
            v_lengths,
            length,
            pos,
            q_pos,
        ), self.options

    @property
    def options(self) -> dict:
        """Keyword arguments of `entropy_decode`."""
        return {
            "k_format": self.k.format(self.head_dim),
            "v_format": self.v.format(self.head_dim),
            "soft_cap": self.soft_cap,
            "sliding_window": self.sliding_window,
        }

    def shapes(self) -> tuple:
        """The positional arguments as ShapeDtypeStructs; draws nothing."""
        heads = (len(self.length), self.num_kv_heads)
        shape = (*heads, self.num_slots, self.head_dim)
        (k, k_lengths), (v, v_lengths) = self.k.shapes(shape), self.v.shapes(shape)
        q = jax.ShapeDtypeStruct((*heads, self.rows, self.head_dim), jnp.dtype(self.dtype))
        positions = position_shapes(self.positions, shape[:3], self.rows)
        return q, k, v, k_lengths, v_lengths, jax.ShapeDtypeStruct(heads[:1], jnp.int32), *positions


PACKED = Side("planes", "token", num_levels=12, spread=2.0)

CASES = {
    "streams": Case(),
    "planes": Case(PACKED, PACKED),
    "planes-streams": Case(PACKED, Side("channel")),
    **{
        f"{along}-{scales}": Case(Side(along, scales), Side(along, scales))
        for along in ("token", "channel")
        for scales in ("token", "channel", "block", "groups")
    },
    **{f"head_dim-{d}": Case(head_dim=d, num_kv_heads=1) for d in (65, 80, 96, 128, 256)},
    **{
        f"keys-token-values-channel-{scales}": Case(Side("token", scales), Side("channel", scales))
        for scales in ("token", "channel", "groups")
    },
    "planes-head_dim-80": Case(PACKED, PACKED, head_dim=80),
    **{f"planes-of-{n}-tokens": Case(*[dataclasses.replace(PACKED, pack=n)] * 2, num_kv_heads=1) for n in (8, 32)},
    **{f"rows-{r}": Case(rows=r, num_kv_heads=1) for r in (1, 7, 16, 40)},
    "blocks-of-two-sizes": Case(Side("token", "block"), Side("channel", "token", block=128)),
    "lengths": Case(num_kv_heads=1, num_slots=1024, length=(0, 1, 64, 511, 512, 513, 1024)),
    "odd-slots": Case(num_kv_heads=1, num_slots=64 * 11, length=(700, 7)),
    "byte-codes": Case(Side("token", num_levels=256, spread=40.0), Side("channel", num_levels=200, spread=9.0)),
    "two-levels": Case(Side("token", num_levels=2), Side("channel", num_levels=3)),
    "bfloat16-query": Case(dtype="bfloat16"),
    "soft-cap": Case(soft_cap=20.0),
    "positions": Case(positions="shared"),
    "positions-per-head": Case(PACKED, PACKED, positions="per head"),
    "sliding-window": Case(positions="shared", sliding_window=50),
}

# What the ahead-of-time compilation measures: the defaults of PackKV and KVComp.
SERVING = {
    f"{name}-head_dim-{head_dim}": Case(
        k, v, head_dim, num_kv_heads=heads, rows=rows, num_slots=32768, length=(32768,) * 8, dtype="bfloat16"
    )
    for name, k, v in (
        ("planes", Side("planes", "token", 12, room=3.0), Side("planes", "token", 7, room=2.75)),
        ("streams", Side("token", "block"), Side("channel", "token", 12)),
    )
    for head_dim, heads, rows in ((64, 3, 3), (128, 8, 4))
}
