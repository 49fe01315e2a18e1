"""From a method to the caches of a whole model: one spec a layer."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp

from kvcomp_jax.cache import LayerCache, init
from kvcomp_jax.retrieval import LookupState
from kvcomp_jax.rotary import Rotary
from kvcomp_jax.spec import LayerSpec, Rung
from kvcomp_jax.tiers import Tier


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a plan needs to know of a model.

    Attributes:
      num_layers, num_kv_heads, head_dim: Sizes.
      num_heads: Query heads, a multiple of num_kv_heads; None if unknown.
      sliding_windows: Tokens that queries of each layer see, None for all; empty means None everywhere.
      max_positions: Positions that the model was made for; None if it has no limit.
      ropes: How keys of each layer are rotated, None for not at all; empty means None everywhere.
      fingerprint: Of configuration and weights; None if unknown.
      calibrations: Folder beside the model for what was calibrated for it; None if unknown.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    sliding_windows: tuple[int | None, ...] = ()
    max_positions: int | None = None
    ropes: tuple[Rotary | None, ...] = ()
    fingerprint: str | None = None
    calibrations: str | None = None
    num_heads: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads is not None and (self.num_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}.")
        for name in ("sliding_windows", "ropes"):
            given = getattr(self, name)
            if given and len(given) != self.num_layers:
                raise ValueError(f"{name} has {len(given)} entries for {self.num_layers} layers.")

    def rope(self, layer: int, max_len: int) -> Rotary | None:
        """How keys of a layer are rotated in texts of up to `max_len` tokens.

        Raises:
          ValueError: If the frequencies change with the text's length before that.
        """
        rope = self.ropes[layer] if self.ropes else None
        if rope is not None and rope.max_len is not None and max_len > rope.max_len:
            raise ValueError(
                f"keys rotate by frequencies that change once a text exceeds {rope.max_len} tokens, so they cannot be "
                f"undone in texts of up to max_len={max_len}; keep texts shorter, or use a method that stores keys "
                "rotated."
            )
        return rope


class Planner(Protocol):
    """Whatever can make a plan for a prompt of another length; `Method` is one."""

    def plan(
        self, layout: Layout, *, max_len: int, prompt_len: int | None = None, longest: int | None = None
    ) -> "CachePlan":
        """Return the specs of all layers for prompts of up to `prompt_len` tokens in a batch of up to `longest`."""
        ...


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The spec of every layer's cache.

    `planner`, `max_len` and `longest`, of the prompts, say how the plan was made, so that rows whose prompts differ in
    length can have the budgets that each would have alone.
    """

    specs: tuple[LayerSpec, ...]
    layout: Layout
    planner: Planner | None = None
    max_len: int = 0
    longest: int | None = None

    def __post_init__(self) -> None:
        if len(self.specs) != self.layout.num_layers:
            raise ValueError(f"a plan of {len(self.specs)} specs does not fit {self.layout.num_layers} layers.")

    @property
    def block_size(self) -> int:
        """Decode steps between two calls of `settle`."""
        return min((spec.block_size for spec in self.specs if spec.rungs), default=2**30)

    def init(self, *, batch: int, dtype: Any, prompt_lens: Sequence[int] | None = None) -> tuple[LayerCache, ...]:
        """Return an empty cache for every layer.

        Args:
          batch: Rows.
          dtype: Of exact tokens.
          prompt_lens: Tokens of each row's prompt; budgets that are fractions then follow each row's own.
        """
        if prompt_lens is not None and len(prompt_lens) != batch:
            raise ValueError(f"prompt_lens has {len(prompt_lens)} entries for batch={batch}.")
        heads, head_dim = self.layout.num_kv_heads, self.layout.head_dim
        caches = tuple(
            init(spec, batch=batch, num_kv_heads=heads, head_dim=head_dim, dtype=dtype) for spec in self.specs
        )
        if prompt_lens is None:
            return caches
        rows = self.row_plans(prompt_lens)
        return tuple(_limited(cache, [row.specs[i] for row in rows]) for i, cache in enumerate(caches))

    def row_plans(self, prompt_lens: Sequence[int]) -> list["CachePlan"]:
        """The plan of each row alone; this one where it does not depend on the prompt."""
        if self.planner is None:
            return [self] * len(prompt_lens)
        made = {n: self._row_plan(self.planner, n) for n in set(prompt_lens)}
        return [made[n] for n in prompt_lens]

    def _row_plan(self, planner: Planner, prompt_len: int) -> "CachePlan":
        try:
            return planner.plan(self.layout, max_len=self.max_len, prompt_len=prompt_len, longest=self.longest)
        except ValueError as error:
            raise ValueError(f"a row with {prompt_len=}: {error}") from error


def _limited(cache: LayerCache, specs: list[LayerSpec]) -> LayerCache:
    """Restrict each row of a cache to the sizes of its own spec.

    A short row's budget may call for another kind of cache in a sliding-window layer, one that evicts, where the
    longest row's is a ring of the whole window; such a row gets the ring, and loses nothing.
    """
    specs = [spec if len(spec.rungs) == len(cache.spec.rungs) else cache.spec for spec in specs]
    for spec in specs:
        if any(a > b for a, b in zip(_for_prompt(spec), _for_prompt(cache.spec), strict=True)):
            raise ValueError("a row's budget exceeds the plan's: make the plan with prompt_len of the longest prompt.")
        if cache.spec.prefill == "stored" and spec.bind(cache.window.k.dtype) != cache.spec:
            raise ValueError("prefill='stored' needs one budget for all rows: state it in tokens, not as a fraction.")
    room = jnp.array([_for_prompt(spec)[1:] for spec in specs], jnp.int32)
    tiers = tuple(
        dataclasses.replace(
            tier, limit=(room[:, i] + rung.reserve) * tier.pooled, lookup=_limited_lookup(tier, i, specs)
        )
        for i, (tier, rung) in enumerate(zip(cache.tiers, cache.spec.rungs, strict=True))
    )
    return dataclasses.replace(cache, tiers=tiers, window_limit=jnp.array([s.window for s in specs], jnp.int32))


def _limited_lookup(tier: Tier, rung: int, specs: list[LayerSpec]) -> LookupState | None:
    """Restrict what queries of each row read to what its own spec says."""
    return tier.lookup and tier.lookup.limited([spec.rungs[rung].lookup for spec in specs])


def _for_prompt(spec: LayerSpec) -> list[int]:
    """Tokens of a prompt that window and rungs take."""
    return [spec.window, *(rung.capacity - rung.reserve for rung in spec.rungs)]


def clip(spec: LayerSpec, max_len: int) -> LayerSpec:
    """Drop slots that rows of at most `max_len` tokens never fill."""

    def fit(rung: Rung, step: int) -> Rung:
        num_steps = -(-max_len // (spec.block_size if spec.divided else step))
        capacity = min(rung.capacity, num_steps * step)
        return dataclasses.replace(rung, capacity=capacity, reserve=max(capacity - (rung.capacity - rung.reserve), 0))

    rungs = tuple(fit(rung, step) for rung, step in zip(spec.rungs, spec.steps, strict=True))
    return dataclasses.replace(spec, window=min(spec.window, max_len), rungs=rungs)


def localise(spec: LayerSpec, sliding_window: int, max_len: int, head_dim: int, num_kv_heads: int = 1) -> LayerSpec:
    """Fit a spec to a layer whose queries see only `sliding_window` tokens.

    The cache then never occupies more than the exact ring of that window: an evicting spec that is larger, or a
    compressed one that would not pay, becomes that ring; a compressed one is cut to the window. Queries read all of it.
    """
    window = min(sliding_window, max_len)
    spec = dataclasses.replace(spec, rungs=tuple(dataclasses.replace(rung, lookup=None) for rung in spec.rungs))
    ring = LayerSpec(window=window, sliding_window=sliding_window)
    if spec.policy.fifo and spec.rungs:
        spec = _cut(spec, window)
    if spec.max_tokens > window + 2 * spec.block_size or _bits(spec, num_kv_heads, head_dim) >= _bits(
        ring, num_kv_heads, head_dim
    ):
        return ring
    return dataclasses.replace(spec, sliding_window=sliding_window)


def _cut(spec: LayerSpec, num_tokens: int) -> LayerSpec:
    """Drop capacity that no query can reach: the rungs hold what the window does not, in whole blocks."""
    left, rungs = num_tokens - spec.window, []
    for rung in spec.rungs:
        capacity = min(rung.capacity, -(-left // spec.block_size) * spec.block_size)
        if capacity <= 0:
            break
        rungs.append(dataclasses.replace(rung, capacity=capacity))
        left -= capacity
    return dataclasses.replace(spec, rungs=tuple(rungs)) if rungs else LayerSpec(window=num_tokens)


def _bits(spec: LayerSpec, num_kv_heads: int, head_dim: int) -> int:
    """Allocated bits a row with 16-bit exact tokens."""
    bound = spec.bind(jnp.bfloat16)
    heads = num_kv_heads if spec.heads is None else len(spec.heads)
    rungs = sum(c.size(r.capacity, heads, head_dim)[0] for r in bound.rungs for c in (r.k, r.v))
    return rungs + (spec.window_slots + spec.policy.num_sinks) * 2 * num_kv_heads * head_dim * 16
