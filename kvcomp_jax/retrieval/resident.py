"""Pages that are at hand, of which a step brings in others: a few that rank high, or all that it reads."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kvcomp_jax.types import pytree
from pallas_kernels.gather_decode import page_top_k


@pytree
class Residents:
    """Which pages of a rung are at hand, for g groups of heads that read the same, and what was counted so far."""

    page: jax.Array  # i32[B, g, c], page in each slot, -1 = none; no page twice
    recalled: jax.Array  # i32[B, g], pages brought in
    wanted: jax.Array  # i32[B, g], pages that were looked for, at hand or not


def no_residents(batch: int, groups: int, num_slots: int) -> Residents:
    """Nothing at hand."""
    return Residents(
        page=jnp.full((batch, groups, num_slots), -1, jnp.int32),
        recalled=jnp.zeros((batch, groups), jnp.int32),
        wanted=jnp.zeros((batch, groups), jnp.int32),
    )


def slot_of(page: jax.Array, num_pages: int) -> jax.Array:
    """The inverse of a table page i32[B, g, c]: in which slot each page is, the last, i32[B, g, N], -1 = in none."""
    b, g = jnp.arange(page.shape[0])[:, None, None], jnp.arange(page.shape[1])[None, :, None]
    slot = jnp.broadcast_to(jnp.arange(page.shape[2], dtype=jnp.int32), page.shape)
    none = jnp.full((*page.shape[:2], num_pages), -1, jnp.int32)
    return none.at[b, g, jnp.where(page >= 0, page, num_pages)].max(slot, mode="drop")


def keep_best(residents: Residents, scores: jax.Array, num_live: jax.Array, num_slots: jax.Array) -> Residents:
    """After a prompt: keep the pages of the highest scores f32[B, 1 or g, N] among the first num_live i32[B]."""
    num_pages, most = scores.shape[-1], residents.page.shape[-1]
    live = (jnp.arange(num_pages)[None] < num_live[:, None])[:, None]
    page = page_top_k(scores, live.astype(jnp.int32), min(most, num_pages))
    page = jnp.pad(page, ((0, 0), (0, 0), (0, most - page.shape[-1])), constant_values=-1)
    page = jnp.where((jnp.arange(most)[None] < num_slots[:, None])[:, None], page, -1)
    return dataclasses.replace(residents, page=jnp.broadcast_to(page, residents.page.shape))


def admit(residents: Residents, page: jax.Array, num_slots: jax.Array) -> tuple[Residents, jax.Array]:
    """Take in pages i32[B, n] that just filled, -1 = none, where slots are free.

    Returns:
      The residents, and the slot of each page, i32[B, g, n], beyond the last where there was none.
    """
    most, num_new = residents.page.shape[-1], page.shape[1]
    usable = (jnp.arange(most)[None] < num_slots[:, None])[:, None]
    free = (residents.page < 0) & usable
    slot = jnp.argsort(~free, -1, stable=True)[..., :num_new].astype(jnp.int32)
    slot = jnp.pad(slot, ((0, 0), (0, 0), (0, num_new - slot.shape[-1])), constant_values=most)
    takes = jnp.take_along_axis(free, slot, -1, mode="fill", fill_value=False) & (page >= 0)[:, None]
    slot = jnp.where(takes, slot, most)
    return dataclasses.replace(residents, page=_write(residents.page, slot, page[:, None])), slot


def recall(
    residents: Residents,
    scores: jax.Array,
    num_live: jax.Array,
    num_slots: jax.Array,
    recalls: jax.Array,
    *,
    most: int,
) -> tuple[Residents, jax.Array, jax.Array]:
    """Bring in those of the `recalls` best pages that are not at hand, in place of the residents of the lowest scores.

    Args:
      residents: At hand.
      scores: f32[B, g, N].
      num_live: i32[B], pages that exist, the first ones.
      num_slots: i32[B], slots that a row may use.
      recalls: i32[B], at most `most`; a row with 0 stays as it is.
      most: Pages to look at.

    Returns:
      The residents, and which page goes to which slot, i32[B, g, most] both, -1 and beyond the last where none does.
    """
    num_pages, slots = scores.shape[-1], residents.page.shape[-1]
    most = min(most, num_pages, slots)
    live = (jnp.arange(num_pages)[None] < num_live[:, None])[:, None]
    best = page_top_k(scores, live.astype(jnp.int32), most)
    best = jnp.where((jnp.arange(most)[None] < jnp.minimum(num_slots, recalls)[:, None])[:, None], best, -1)
    missing = (best >= 0) & (_at(slot_of(residents.page, num_pages), best) < 0)
    # Those missing to the front, against the worst residents in turn; slots that are free come before all of them.
    new = jnp.take_along_axis(jnp.where(missing, best, -1), jnp.argsort(~missing, -1, stable=True), -1)
    worth = jnp.where(residents.page < 0, -jnp.inf, _at(scores, residents.page))
    worth = jnp.where((jnp.arange(slots)[None] < num_slots[:, None])[:, None], worth, jnp.inf)
    victim = lax.top_k(-worth, most)[1].astype(jnp.int32)
    slot = jnp.where(new >= 0, victim, slots)
    return (
        Residents(
            page=_write(residents.page, slot, new),
            recalled=residents.recalled + missing.sum(-1),
            wanted=residents.wanted + (best >= 0).sum(-1),
        ),
        new,
        slot,
    )


def hold(
    residents: Residents, wanted: jax.Array, real: jax.Array, num_pages: int
) -> tuple[Residents, jax.Array, jax.Array]:
    """Have the wanted pages at hand and no others: those missing take the slots of those no longer wanted.

    Args:
      residents: At hand.
      wanted: i32[B, g, n], -1 = none, n <= c; a page may come twice.
      real: bool[B]; other rows stay as they are.
      num_pages: Of the rung.

    Returns:
      As `recall`, for n pages.
    """
    num, slots = wanted.shape[-1], residents.page.shape[-1]
    entry = slot_of(wanted, num_pages)
    stays = (residents.page >= 0) & (_at(entry, residents.page) >= 0)
    once = (wanted >= 0) & (_at(entry, wanted) == jnp.arange(num)[None, None]) & real[:, None, None]
    missing = once & (_at(slot_of(residents.page, num_pages), wanted) < 0)
    new = jnp.take_along_axis(wanted, _true_ones(missing), -1, mode="fill", fill_value=-1)
    slot = jnp.where(new >= 0, _true_ones(~stays)[..., :num], slots)
    page = jnp.where(stays | ~real[:, None, None], residents.page, -1)
    return (
        Residents(
            page=_write(page, slot, new),
            recalled=residents.recalled + missing.sum(-1),
            wanted=residents.wanted + once.sum(-1),
        ),
        new,
        slot,
    )


def _at(table: jax.Array, page: jax.Array) -> jax.Array:
    """Entries of a table [B, g, N] for pages i32[B, g, c]; any where there is none."""
    return jnp.take_along_axis(table, jnp.maximum(page, 0), -1)


def _true_ones(mask: jax.Array) -> jax.Array:
    """Where bool[B, g, c] is true, from the first on, then c: i32[B, g, c]. A sort takes XLA on CPU eight times."""
    num = mask.shape[-1]
    rank = jnp.where(mask, jnp.cumsum(mask, -1) - 1, num)
    return _write(jnp.full(mask.shape, num, jnp.int32), rank, jnp.arange(num, dtype=jnp.int32)[None, None])


def _write(table: jax.Array, slot: jax.Array, page: jax.Array) -> jax.Array:
    b, g = jnp.arange(table.shape[0])[:, None, None], jnp.arange(table.shape[1])[None, :, None]
    return table.at[b, g, slot].set(jnp.broadcast_to(page, slot.shape), mode="drop")
