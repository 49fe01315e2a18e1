"""What a layer's cache is, before it holds anything: static, hashable, no arrays."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs import Codec, Identity
from kvcomp_jax.orders import Order
from kvcomp_jax.policies import Policy, Recency
from kvcomp_jax.retrieval import Lookup
from kvcomp_jax.rotary import Rotary


@dataclasses.dataclass(frozen=True)
class Rung:
    """One storage form of the ladder: a codec for K, one for V, and slots a row and KV head.

    `share` is the part of the tokens reaching this rung that stays on it, those with the highest scores. 1: all of
    them, and what they displace goes to the next rung. A ranked prompt leaves `reserve` slots free for later tokens.
    `order` rearranges the tokens of each unit where both K and V are encoded anew. `heads` are the KV heads that have
    slots here, None for all; the others forget what leaves the window. With a `lookup` a query reads only some of the
    rung's tokens, see there; None reads all.
    """

    k: Codec
    v: Codec
    capacity: int
    share: float = 1.0
    reserve: int = 0
    order: Order | None = None
    heads: tuple[int, ...] | None = None
    lookup: Lookup | None = None

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity} of a rung must be at least 1 token.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} of a rung must be in (0, 1].")
        if not 0 <= self.reserve < self.capacity:
            raise ValueError(f"reserve={self.reserve} of a rung must be in [0, capacity={self.capacity}).")
        if self.order is not None:
            self.order.check(self.k, self.v)
        if self.heads is not None and (not self.heads or list(self.heads) != sorted({*self.heads})):
            raise ValueError(f"heads={self.heads} of a rung must be KV heads in ascending order, at least one.")

    @property
    def unit(self) -> int:
        """Tokens that enter and leave together."""
        return math.lcm(self.k.unit, self.v.unit)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """An exact window of recent tokens above a ladder of rungs.

    Tokens leave the window `block_size` at a time, once it holds `window + block_size`, settle on the first rung and
    are displaced downwards; what the last rung displaces is evicted. Without rungs the window is a plain ring of
    `window` tokens. `policy.num_sinks` first tokens stay exact beside all this.

    Where rungs have shares, a block is divided once, by score, when it settles: nothing moves from rung to rung, so
    nothing is quantised twice. A full rung forgets its own oldest tokens; of a prompt it keeps its best.

    Attributes:
      rungs: From best to worst.
      policy: Ranks tokens on the rungs.
      window: Most recent tokens kept exact, at least.
      block_size: Tokens that settle together; `settle` is due after this many decode steps, and one `decode` call
        takes no more tokens than this.
      sliding_window: Tokens that a query of this layer may see, itself included (a property of the model).
      prefill: How queries of a prompt see its tokens: "exact", or "stored" as a stream would have stored them by then,
        in the arithmetic of the codecs. The latter is for policies that go by age. Turns on top of a filled cache are
        read exactly either way.
      drop: Share of the last rung's tokens, or as an int how many, that are evicted at once when the rung is full, so
        that it then has room for a while; 0 makes room only for the tokens that come.
      keep: Share of each block that settles after the prompt, at least a token, those with the highest scores, and all
        whose score is infinite; the rest is evicted.
      close_gap: How keys rotate, to read sinks as if evicted tokens had never stood between them and the rest, by
        positions counted in the cache; None reads them at their positions in the text.
    """

    rungs: tuple[Rung, ...] = ()
    policy: Policy = Recency()
    window: int = 0
    block_size: int = 1
    sliding_window: int | None = None
    prefill: Literal["exact", "stored"] = "exact"
    drop: int | float = 0.0
    keep: float = 1.0
    close_gap: Rotary | None = None

    def __post_init__(self) -> None:
        if self.window < 0 or self.block_size < 1:
            raise ValueError(f"window={self.window} must be >= 0 and block_size={self.block_size} >= 1.")
        if not self.rungs and (self.window < 1 or not self.policy.fifo):
            raise ValueError("a LayerSpec without rungs needs window >= 1 and a policy that goes by age (Recency).")
        if self.prefill not in ("exact", "stored"):
            raise ValueError(f"prefill={self.prefill!r} must be 'exact' or 'stored'.")
        if self.prefill == "stored" and not self.policy.fifo:
            raise ValueError(
                f"prefill='stored' needs a policy that goes by age (Recency): what {type(self.policy).__name__} keeps "
                "is known after the prompt; use prefill='exact'."
            )
        most = math.inf if isinstance(self.drop, int) else 1
        if not 0 <= self.drop <= most or (self.drop and (self.policy.fifo or not self.rungs or self.divided)):
            raise ValueError(f"drop={self.drop} must be a share in [0, 1] or an int, of a rung that ranks its tokens.")
        if not 0 < self.keep <= 1 or (self.keep < 1 and (self.policy.fifo or self.divided or self.steps[0] > 1)):
            raise ValueError(f"keep={self.keep} must be in (0, 1], of blocks of single tokens that are ranked.")
        if self.close_gap is not None and not self.policy.fifo:
            raise ValueError(f"close_gap needs a policy that goes by age (Recency), got {type(self.policy).__name__}.")
        if self.divided:
            self._check_shares()
        if self.policy.pools_heads and len(self.rungs) != 1:
            raise ValueError(f"heads share the slots of one rung, {self.policy} has {len(self.rungs)}.")
        if any(rung.heads != self.rungs[0].heads for rung in self.rungs):
            raise ValueError("all rungs must serve the same heads.")
        if self.heads is not None and not self.policy.fifo:
            raise ValueError(f"rungs for some heads need a policy that goes by age, got {type(self.policy).__name__}.")
        self._check_lookups()
        for rung, unit in zip(self.rungs, self.steps, strict=True):
            if rung.order is not None and self.policy.fifo and rung is not self.rungs[-1]:
                raise ValueError("a rung with an order must be the last one where positions follow from age.")
            if rung.capacity % unit:
                raise ValueError(f"capacity={rung.capacity} of a rung must be a multiple of {unit} tokens.")

    def _check_shares(self) -> None:
        if self.policy.fifo:
            raise ValueError(
                f"rungs with shares need a policy that ranks tokens, {type(self.policy).__name__} does not."
            )
        if self.rungs[-1].share < 1:
            raise ValueError(f"share={self.rungs[-1].share} of the last rung must be 1: nothing comes after it.")
        for rung, tokens in zip(self.rungs, self.steps, strict=True):
            if tokens < 1 or tokens % rung.unit:
                raise ValueError(
                    f"share={rung.share} keeps {tokens} tokens of block_size={self.block_size} on a rung; they must be "
                    f"a positive multiple of {rung.unit}, those that its codecs encode together."
                )

    def _check_lookups(self) -> None:
        for rung in self.rungs:
            if rung.lookup is None:
                continue
            if not self.policy.fifo or self.divided or rung.order is not None or rung.heads is not None:
                raise ValueError(
                    "a rung with a lookup needs a policy that goes by age (Recency), all heads, no shares, no order."
                )
            if self.sliding_window is not None or self.prefill == "stored":
                raise ValueError(
                    "a rung with a lookup is for layers without sliding_window, whose prompts are read with "
                    "prefill='exact'."
                )
            if rung.lookup.num_queries > self.policy.num_probes(1):
                raise ValueError("a lookup with recalls needs Recency(num_queries=1): the prompt's last query.")
            rung.lookup.check(rung.k, rung.v, self.block_size)

    @property
    def heads(self) -> tuple[int, ...] | None:
        """KV heads that have slots on the rungs; None: all."""
        return self.rungs[0].heads if self.rungs else None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt that a row keeps."""
        return self.policy.num_sinks + self.window + sum(rung.capacity - rung.reserve for rung in self.rungs)

    @property
    def divided(self) -> bool:
        """Whether rungs have shares, so that a token settles once and for all."""
        return any(rung.share < 1 for rung in self.rungs)

    @property
    def steps(self) -> tuple[int, ...]:
        """Tokens that enter each rung together: its share of a block, the block, or a unit of its codecs."""
        if not self.divided:
            return tuple(self.block_size if self.policy.fifo else rung.unit for rung in self.rungs)
        left, kept = self.block_size, []
        for rung in self.rungs:
            kept.append(round(rung.share * left))
            left -= kept[-1]
        return tuple(kept)

    def evicts_nothing(self, max_len: int) -> bool:
        """Whether rows of up to `max_len` tokens lose none, in any head, by whatever policy."""
        held = sum(rung.capacity for rung in self.rungs) + self.window + self.policy.num_sinks
        complete = bool(self.rungs) and self.heads is None and self.policy.fifo
        return complete and held >= max_len // self.block_size * self.block_size

    @property
    def prompt_step(self) -> int:
        """Tokens by which a prompt settles: whole blocks, or as few as the codecs take if an index wants them all."""
        if any(rung.lookup is not None and rung.lookup.index.settles_at_once for rung in self.rungs):
            return math.lcm(*(rung.unit for rung in self.rungs))
        return self.block_size

    @property
    def window_slots(self) -> int:
        """Slots of the window's ring: room for a block that waits to settle and for one block of steps."""
        return self.window + (2 * self.block_size - 1 if self.rungs else self.block_size - 1)

    @property
    def max_tokens(self) -> int:
        """Tokens a row holds at most right after `settle`, sinks included."""
        slack = self.block_size - 1 if self.rungs else 0
        return self.policy.num_sinks + self.window + slack + sum(r.capacity for r in self.rungs)

    def settled_before(self, seen: jax.Array) -> jax.Array:
        """Tokens that left the window of a stream by age when the one comes that follows `seen` (int, elementwise).

        Both count from the sinks on; `settle` is called after every token.
        """
        if not self.rungs:
            return jnp.maximum(seen + 1 - self.window, 0)
        return jnp.maximum(seen - self.window, 0) // self.block_size * self.block_size

    def check(self, head_dim: int) -> None:
        """Raise ValueError if a codec cannot store blocks of this spec with rows of `head_dim`."""
        for rung, step in zip(self.rungs, self.steps, strict=True):
            block = math.lcm(self.block_size, rung.unit) if not self.policy.fifo and not self.divided else step
            for codec in (rung.k, rung.v):
                codec.check(head_dim, block)
                if codec.joins_heads and not self.policy.fifo and (codec.uses_pos or not self.divided):
                    raise ValueError(
                        f"{type(self.policy).__name__} keeps different tokens in each head, and {codec.name} "
                        "stores the heads of a token together; encode each head alone, as with across_heads=false."
                    )
            if not self.divided and self.block_size % rung.unit:
                raise ValueError(
                    f"block_size={self.block_size} must be a multiple of {rung.unit}, "
                    "the tokens that its rungs' codecs encode together."
                )

    def bind(self, dtype) -> "LayerSpec":
        """Return this spec with its codecs bound to the dtype of exact tokens."""
        rungs = tuple(dataclasses.replace(r, k=r.k.bind(dtype), v=r.v.bind(dtype)) for r in self.rungs)
        return dataclasses.replace(self, rungs=rungs)


def exact_rung(capacity: int, reserve: int = 0) -> Rung:
    """A rung that stores rows as they are, `capacity` of them beside those in `reserve`."""
    return Rung(Identity(), Identity(), capacity + reserve, reserve=reserve)


def blocks(num_tokens: int, block_size: int) -> int:
    """Slots that hold all whole blocks among `num_tokens` tokens, at least one block."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1 token.")
    return max(num_tokens // block_size, 1) * block_size


def room(max_tokens: int, block_size: int) -> int:
    """Slots that hold `max_tokens` tokens, in whole blocks."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1 token.")
    return -(-max_tokens // block_size) * block_size
