"""An index at work: what a rung keeps beside its rows, and what a query reads of it."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs import Codec
from kvcomp_jax.retrieval.base import Index, Selection, Summary, by_head
from kvcomp_jax.retrieval.host import fetch_into, store, to_host
from kvcomp_jax.retrieval.resident import Residents, admit, hold, keep_best, no_residents, recall, slot_of
from kvcomp_jax.types import pytree, static
from kvcomp_jax.units import put, take


@dataclasses.dataclass(frozen=True)
class Lookup:
    """That a query reads only some tokens of a rung: `tokens` of them at most, chosen by `index`.

    `recalls` None: what the query ranks highest. A number: all pages at hand, `tokens` of them, into which a step
    brings the missing ones of the `recalls` best, in place of those it ranks lowest. After a prompt the best pages by
    the mean of all heads of its last query are at hand; a page that enters later is, if there is room.
    `memory` says where the rung's rows stand: on the "device", or in "host" memory, from where what is not at hand is
    brought to copies on the device, `tokens` for each list of pages; at hand is then, without `recalls`, what the last
    query read. `lists` are those of a KV head: its query heads where they read for themselves, else 1.
    """

    index: Index
    tokens: int
    recalls: int | None = None
    memory: str = "device"
    lists: int = 1

    def __post_init__(self) -> None:
        if self.tokens < self.index.page_size:
            raise ValueError(
                f"tokens={self.tokens} that a query reads must be at least a page of {self.index.page_size}."
            )
        if self.memory not in ("device", "host"):
            raise ValueError(f"memory={self.memory!r} must be 'device' or 'host'.")
        if self.lists < 1 or (self.lists > 1 and self.index.heads != "query"):
            raise ValueError(f"lists={self.lists} must be at least 1, and is 1 unless query heads read for themselves.")
        if self.recalls is not None:
            if self.recalls < 1:
                raise ValueError(f"recalls={self.recalls} must be at least 1 page a step.")
            if not self.index.ranks_pages or self.index.heads == "query":
                raise ValueError(
                    f"recalls={self.recalls} needs an index of pages that heads='kv' or groups of them share, "
                    f"got {self.index}."
                )

    @property
    def num_pages(self) -> int:
        """Pages that a query reads at most."""
        return self.tokens // self.index.page_size

    @property
    def pools(self) -> bool:
        """Whether what is read are copies on the device of rows in host memory."""
        return self.memory == "host"

    @property
    def num_queries(self) -> int:
        """Last queries of a prompt that must be known when it is stored."""
        return 0 if self.recalls is None else 1

    def check(self, k: Codec, v: Codec, block_size: int) -> None:
        """Raise ValueError if codecs of a rung or blocks that enter it do not suit."""
        self.index.check(k, v, block_size)
        for codec in (k, v):
            if codec.uses_pos and self.memory == "host":
                raise ValueError(f"memory='host' keeps no positions at hand, and {codec.name} needs them to decode.")
            if codec.joins_heads and self.index.heads != 1:
                raise ValueError(
                    f"{codec.name} stores the heads of a token together, and heads={self.index.heads!r} read different "
                    "tokens; let all heads of a layer read the same (heads=1)."
                )

    def start(
        self,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        block_size: int,
        head_dim: int,
        dtype: Any,
        rows: Callable[[int], Any],
    ) -> "LookupState":
        """The state of an empty rung; `rows` makes encodings of K and V of so many tokens."""
        groups, counted = self.index.num_groups(num_kv_heads) * self.lists, self.pools or self.recalls is not None
        pool = rows(self.num_pages * self.index.page_size) if self.pools else None
        return LookupState(
            lookup=self,
            summary=self.index.empty(batch, num_kv_heads, capacity, block_size, head_dim, dtype),
            limit=jnp.full(batch, self.tokens, jnp.int32),
            recalls=None if self.recalls is None else jnp.full(batch, self.recalls, jnp.int32),
            resident=no_residents(batch, groups, self.num_pages) if counted else None,
            pool=jax.tree.map(lambda x: jnp.repeat(x, self.lists, 1), pool),
        )


@pytree
class LookupState:
    """What a rung with an index keeps beside its rows."""

    lookup: Lookup = static()
    summary: Summary
    limit: jax.Array  # i32[B], tokens that a query of this row reads, <= lookup.tokens
    recalls: jax.Array | None  # i32[B], pages that a step looks whether to bring in, <= lookup.recalls
    resident: Residents | None
    pool: Any  # encodings of K and V of the pages at hand, [B, K * lists, ...], if these are copies

    def choose(
        self, q: jax.Array, filled: jax.Array, real: jax.Array, rows: Any, num_pages: int
    ) -> tuple[Selection, "LookupState"]:
        """Choose what queries q f32[B, K, G, D] of one token a row read.

        Args:
          q: Scaled or not, in the basis of the exact keys.
          filled: i32[B], slots of the rung that hold tokens.
          real: bool[B], which rows have a query; others recall nothing.
          rows: Encodings of K and V of the rung. num_pages: Its pages.

        Returns:
          A selection with K' in place of K, see `Index.pooled`, and the state, with what is read at hand.
        """
        index, size = self.lookup.index, self.lookup.index.page_size
        scores = index.pooled(index.rank(q, self.summary))
        if self.recalls is None:
            chosen = index.select(scores, self.summary, filled, self.limit, self.lookup.num_pages)
            if self.resident is None:
                return chosen, self
            if chosen.page.shape[2] != self.lookup.lists:
                raise ValueError(
                    f"lists={self.lookup.lists} are kept at hand of a KV head, and {chosen.page.shape[2]} are read: "
                    "state Layout.num_heads as the model has them."
                )
            wanted = chosen.page.reshape(*self.resident.page.shape[:2], -1)
            resident, new, slot = hold(self.resident, wanted, real, num_pages)
        else:
            sizes = (filled // size, self.limit // size, jnp.where(real, self.recalls, 0))
            held = cast(Residents, self.resident)
            resident, new, slot = recall(held, scores[:, :, 0], *sizes, most=self.lookup.recalls or 0)
            page = resident.page[:, :, None]
            chosen = Selection(page=page, first=None, end=jnp.full_like(page, size))
        state = dataclasses.replace(self, resident=resident)
        if self.pool is None:
            return chosen, state
        new, slot = (by_head(x, q.shape[1] * self.lookup.lists) for x in (new, slot))
        pool = fetch_into(
            self.pool, rows, new, slot, num_pages=num_pages, num_slots=self.lookup.num_pages, page_size=size
        )
        return chosen, dataclasses.replace(state, pool=pool)

    def copies_read(self, chosen: Selection, num_pages: int) -> jax.Array:
        """Which tokens of the pool's pages a selection reads, all of which are at hand: bool[B, g, tokens]."""
        size, page = self.lookup.index.page_size, cast(Residents, self.resident).page
        if chosen.first is None or size == 1:  # whole pages, and no others are at hand
            return jnp.repeat(page >= 0, size, -1)
        wanted, first, end = (x.reshape(*page.shape[:2], -1) for x in (chosen.page, chosen.first, chosen.end))
        slot = jnp.take_along_axis(slot_of(page, num_pages), jnp.maximum(wanted, 0), -1)
        here = (wanted >= 0) & (slot >= 0)  # rows without a query brought nothing
        # A page may be read in parts; +1 where one begins and -1 where it ends.
        b, g = jnp.arange(page.shape[0])[:, None, None], jnp.arange(page.shape[1])[None, :, None]
        edges = jnp.zeros((*page.shape[:2], page.shape[2] * size + 1), jnp.int32)
        for at, change in ((first, 1), (end, -1)):
            edges = edges.at[b, g, jnp.where(here, slot * size + at, edges.shape[2])].add(change, mode="drop")
        return jnp.cumsum(edges, -1)[..., :-1] > 0

    def from_prompt(
        self, keys: jax.Array, count: jax.Array, query: jax.Array | None
    ) -> tuple["LookupState", jax.Array | None]:
        """See `Index.from_prompt`; query f32[B, K, G, D] is the prompt's last, needed where pages are at hand."""
        index, resident = self.lookup.index, self.resident
        summary, order = index.from_prompt(self.summary, keys, count)
        if resident is not None and self.recalls is not None:
            if query is None:
                raise TypeError("a lookup with recalls needs a policy that keeps the prompt's last query.")
            scores = index.rank(query, summary).mean((1, 2))[:, None]
            resident = keep_best(resident, scores, count // index.page_size, self.limit // index.page_size)
        return dataclasses.replace(self, summary=summary, resident=resident), order

    def add(self, keys: jax.Array, first: jax.Array, due: jax.Array) -> tuple["LookupState", jax.Array | None]:
        """See `Index.add`."""
        index, resident = self.lookup.index, self.resident
        summary, order = index.add(self.summary, keys, first, due)
        if resident is not None and self.recalls is not None:
            size = index.page_size
            page = (first // size)[:, None] + jnp.arange(keys.shape[2] // size)[None]
            resident, _ = admit(resident, jnp.where(due[:, None], page, -1), self.limit // size)
        return dataclasses.replace(self, summary=summary, resident=resident), order

    def offload(self, rows: Any, num_kv_heads: int, num_pages: int) -> tuple[Any, "LookupState"]:
        """Bring a prompt's encodings to where the rung keeps them, and copy what is at hand."""
        if self.lookup.memory == "device":
            return rows, self
        pool = self.pool
        if self.recalls is not None:
            page = cast(Residents, self.resident).page
            pool = take(rows, jnp.maximum(by_head(page, num_kv_heads), 0), num_pages)
        return to_host(rows), dataclasses.replace(self, pool=pool)

    def store(self, rows: Any, page: jax.Array, new: Any, num_pages: int) -> tuple[Any, "LookupState"]:
        """Write a block's encodings to pages i32[B, K, n] on the host, -1 = none, and to the pool those at hand."""
        held, lists = cast(Residents, self.resident).page, self.lookup.lists
        listed, copies = jax.tree.map(lambda x: jnp.repeat(x, lists, 1), (page, new))
        at = jnp.take_along_axis(by_head(slot_of(held, num_pages), listed.shape[1]), jnp.maximum(listed, 0), -1)
        slots = held.shape[-1]
        pool = put(self.pool, jnp.where((listed >= 0) & (at >= 0), at, slots), copies, slots)
        return store(rows, page, new, num_pages), dataclasses.replace(self, pool=pool)

    def limited(self, lookups: list["Lookup | None"]) -> "LookupState":
        """This state where each row reads as much as its own lookup says; None = no less than the others."""
        own = [self.lookup if lookup is None else lookup for lookup in lookups]
        limit = jnp.array([min(lookup.tokens, self.lookup.tokens) for lookup in own], jnp.int32)
        if self.recalls is None:
            return dataclasses.replace(self, limit=limit)
        recalls = jnp.array([min(x.recalls or 0, self.lookup.recalls or 0) for x in own], jnp.int32)
        return dataclasses.replace(self, limit=limit, recalls=recalls)

    def freed(self, row: jax.Array | int) -> "LookupState":
        """This state with one row as in an empty rung; its limit stays."""
        resident = self.resident
        if resident is not None:
            resident = Residents(
                page=resident.page.at[row].set(-1),
                recalled=resident.recalled.at[row].set(0),
                wanted=resident.wanted.at[row].set(0),
            )
        summary = jax.tree.map(lambda x: x.at[row].set(0), self.summary)
        return dataclasses.replace(self, summary=summary, resident=resident)

    def copied_bytes(self, num_tokens: int) -> int:
        """Bytes of one row's copies on the device, for a rung of `num_tokens` live tokens in host memory."""
        per_row = sum(x.size // x.shape[0] * x.dtype.itemsize for x in jax.tree.leaves(self.pool))
        size = self.lookup.index.page_size
        return per_row * min(num_tokens // size, self.lookup.num_pages) // self.lookup.num_pages

    def live_bytes(self, num_tokens: int) -> int:
        """Bytes of one row for a rung of `num_tokens` live tokens."""
        own = (self.limit, self.recalls, self.resident)
        counters = sum(x.size // x.shape[0] * x.dtype.itemsize for x in jax.tree.leaves(own))
        return counters + self.lookup.index.live_bytes(self.summary, num_tokens)
