"""Canonical prefix codes of bounded length: from weights to lengths, from lengths to codes and look-up tables.

All under jit with static shapes: n symbols, at most `max_bits` bits each, every symbol coded. A code is known by its
lengths alone: sorted by (length, symbol), codes follow each other, so one stands for an interval of 2**(max_bits -
length) numbers of `max_bits` bits, and decoding is finding the interval that the next bits fall into.
Source: package-merge, Larmore and Hirschberg 1990, J. ACM 37(3); canonical codes, Schwartz and Kallick 1964.
"""

import jax
import jax.numpy as jnp
from jax import lax

_NOTHING = 2**31 - 1  # weight of a package that is not there; two of them still fit in 32 bits


def code_lengths(weights: jax.Array, max_bits: int) -> jax.Array:
    """Lengths u8[*b, n] in 1 .. max_bits of an optimal prefix code for symbols of weights i32[*b, n] >= 0.

    Weights of 0 get codes, too. Sums over a level of package-merge must fit in an int32: weights up to 2**31 / max_bits
    in total.

    Raises:
      ValueError: If `max_bits` bits have no room for n codes.
    """
    n = weights.shape[-1]
    if n > 2**max_bits:
        raise ValueError(f"max_bits={max_bits} has room for {2**max_bits} codes, not for {n}; raise max_bits.")
    if n == 1:
        return jnp.ones(weights.shape, jnp.uint8)
    flat = weights.reshape(-1, n).astype(jnp.int32)
    return jax.vmap(lambda w: _package_merge(w, max_bits))(flat).reshape(weights.shape)


def _package_merge(weights: jax.Array, max_bits: int) -> jax.Array:
    n = weights.shape[0]
    order = jnp.argsort(weights, stable=True)
    leaves = weights[order].astype(jnp.uint32)

    def level(items: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        pairs = jnp.minimum(items.reshape(n, 2).sum(1, dtype=jnp.uint32), _NOTHING)
        both = jnp.concatenate([leaves, pairs])
        where = jnp.argsort(both, stable=True)
        return both[where], where < n

    def below(state: tuple, is_leaf: jax.Array) -> tuple[tuple, None]:
        lengths, taken = state
        num_leaves = (is_leaf & (jnp.arange(2 * n) < taken)).sum()
        return (lengths + (jnp.arange(n) < num_leaves), 2 * (taken - num_leaves)), None

    # The 2n - 2 lightest items of the last level make the code; a symbol is as long as it has leaves among them and
    # among the items that their packages stand for, which are always the lightest of the level below.
    _, levels = lax.scan(level, jnp.full(2 * n, _NOTHING, jnp.uint32), None, max_bits)
    start = jnp.zeros(n, jnp.int32), jnp.int32(2 * n - 2)
    (lengths, _), _ = lax.scan(below, start, levels, reverse=True)
    return jnp.zeros(n, jnp.uint8).at[order].set(lengths.astype(jnp.uint8))


def code_starts(lengths: jax.Array, max_bits: int) -> jax.Array:
    """First number of each symbol's interval, i32[*b, n]: its code, followed by zeros up to `max_bits` bits."""
    order = _canonical_order(lengths)
    first = _starts_in_order(jnp.take_along_axis(lengths, order, -1), max_bits)
    return jnp.take_along_axis(first, jnp.argsort(order, -1), -1)


def look_up_table(lengths: jax.Array, max_bits: int) -> jax.Array:
    """What the next `max_bits` bits begin with: symbol + 256 * length, u16[*b, 2**max_bits], n <= 256."""
    order = _canonical_order(lengths)
    ordered = jnp.take_along_axis(lengths, order, -1)
    entries = order + (ordered.astype(jnp.int32) << 8)
    bits = jnp.arange(2**max_bits, dtype=jnp.int32).reshape(*(1,) * (lengths.ndim - 1), -1, 1)
    which = (_starts_in_order(ordered, max_bits)[..., None, :] <= bits).sum(-1) - 1
    return jnp.take_along_axis(entries, which, -1).astype(jnp.uint16)


def _canonical_order(lengths: jax.Array) -> jax.Array:
    """Symbols by (length, symbol), i32[*b, n]."""
    return jnp.argsort(lengths.astype(jnp.int32), -1, stable=True).astype(jnp.int32)


def _starts_in_order(lengths: jax.Array, max_bits: int) -> jax.Array:
    size = jnp.left_shift(1, max_bits - lengths.astype(jnp.int32))
    return jnp.cumsum(size, -1) - size
