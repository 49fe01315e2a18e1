"""The cases that every backend is checked with: interpreted, compiled ahead of time and on hardware."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a function of the operation; `arguments` draws it, `shapes` describes it without arrays."""

    num_queries: int
    num_slots: int
    start: tuple[int, ...] = (0, 0)
    groups: int = 3
    num_kv_heads: int = 2
    head_dim: int = 64
    soft_cap: float | None = None
    sliding_window: int | None = None
    dtype: str = "float32"  # of keys and values
    function: str = "prefill"

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        """Positional and keyword arguments; but for `prefill` an lse of about the right size and rows 3 queries short.

        Queries of `probe_mass` stand anywhere up to the slot where the chunk ends, in no order.
        """
        rng = np.random.default_rng(seed)
        q, k, v, *_ = (
            jnp.asarray(rng.standard_normal(x.shape), x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for x in self._all()
        )
        start = jnp.asarray(self.start, jnp.int32)
        q = q * self.head_dim**-0.5
        if self.function == "prefill":
            return (q, k, v, start), self.options
        lse = jnp.full(q.shape[:4], np.log(self.num_slots), jnp.float32)
        lengths = [max(self.num_queries - 3 * i, 0) for i in range(len(self.start))]
        if self.function == "prefill_with_mass":
            return (q, k, v, start, jnp.asarray(lengths, jnp.int32)), self.options
        if self.function == "mass":
            return (q, k, lse, start, jnp.asarray(lengths, jnp.int32)), self.options
        at = [
            rng.permutation(np.r_[rng.integers(0, first + length, length), np.full(self.num_queries - length, -1)])
            for first, length in zip(self.start, lengths, strict=True)
        ]
        return (q, k, lse, jnp.asarray(at, jnp.int32)), self.options

    @property
    def options(self) -> dict:
        """Keyword arguments."""
        return {"soft_cap": self.soft_cap, "sliding_window": self.sliding_window}

    def shapes(self) -> tuple:
        """The positional arguments as ShapeDtypeStructs."""
        q, k, v, start, length = self._all()
        lse = jax.ShapeDtypeStruct(q.shape[:4], jnp.float32)
        at = jax.ShapeDtypeStruct((q.shape[0], q.shape[3]), jnp.int32)
        return {
            "prefill": (q, k, v, start),
            "prefill_with_mass": (q, k, v, start, length),
            "mass": (q, k, lse, start, length),
            "probe_mass": (q, k, lse, at),
        }[self.function]

    def _all(self) -> tuple:
        batch, shape = len(self.start), jax.ShapeDtypeStruct
        rows = shape((batch, self.num_kv_heads, self.num_slots, self.head_dim), jnp.dtype(self.dtype))
        q = shape((batch, self.num_kv_heads, self.groups, self.num_queries, self.head_dim), jnp.float32)
        return q, rows, rows, shape((batch,), jnp.int32), shape((batch,), jnp.int32)


_SHAPES = {
    "one": Case(1, 1),
    "few": Case(7, 7, groups=1),
    "blocks": Case(300, 300),
    "chunk": Case(64, 700, (0, 500)),
    "odd-soft-cap": Case(130, 515, (385, 3), soft_cap=20.0),
    "window": Case(150, 150, sliding_window=17),
    "window-soft-cap": Case(40, 900, (860, 20), soft_cap=30.0, sliding_window=300),
    "head_dim-80": Case(33, 130, (97, 0), head_dim=80, groups=1),
    "head_dim-256": Case(20, 70, (50,), 1, 1, head_dim=256),
    "head_dim-128-bfloat16": Case(48, 256, (200, 10), head_dim=128, dtype="bfloat16"),
    "one-bfloat16": Case(1, 8, dtype="bfloat16"),
    "blocks-bfloat16": Case(140, 184, (40,), num_kv_heads=1, dtype="bfloat16"),
    "chunk-bfloat16": Case(64, 696, (632, 3), num_kv_heads=1, dtype="bfloat16"),
    "window-soft-cap-bfloat16": Case(
        40, 904, (860, 20), num_kv_heads=1, soft_cap=30.0, sliding_window=300, dtype="bfloat16"
    ),
    "window-head_dim-256-float16": Case(140, 152, (10,), 1, 1, head_dim=256, sliding_window=17, dtype="float16"),
}
# `mass` is `probe_mass` of queries in a row, so that blocks before and after them are passed over.
_CHUNKS = ("one", "blocks", "odd-soft-cap", "window-soft-cap", "blocks-bfloat16", "window-soft-cap-bfloat16")
# `prefill_with_mass` is `prefill` and `probe_mass` on most backends.
_BOTH = (*_CHUNKS, "chunk", "window", "head_dim-80")
CASES = {
    **_SHAPES,
    **{f"mass-{name}": dataclasses.replace(_SHAPES[name], function="mass") for name in _CHUNKS},
    **{f"probes-{name}": dataclasses.replace(case, function="probe_mass") for name, case in _SHAPES.items()},
    **{f"with-mass-{name}": dataclasses.replace(_SHAPES[name], function="prefill_with_mass") for name in _BOTH},
}

# What the ahead-of-time compilation and the benchmarks measure: a chunk of a prompt, and a tenth of it as probes.
_SERVING = {
    "head_dim-128": Case(512, 32768, (32256,), 4, 8, 128, dtype="bfloat16"),
    "head_dim-64": Case(512, 8192, (7680,) * 2, 3, 3, 64, dtype="bfloat16"),
    "head_dim-128-window": Case(512, 32768, (32256,), 4, 8, 128, sliding_window=4096, dtype="bfloat16"),
}
SERVING = {
    **_SERVING,
    **{f"mass-{name}": dataclasses.replace(case, function="mass") for name, case in _SERVING.items()},
    "probes-head_dim-128": dataclasses.replace(_SERVING["head_dim-128"], function="probe_mass", num_queries=52),
    "probes-head_dim-64": dataclasses.replace(_SERVING["head_dim-64"], function="probe_mass", num_queries=52),
}
