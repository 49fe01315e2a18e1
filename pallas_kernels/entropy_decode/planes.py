"""Packs of variable width as bit planes: what a pack's codes exceed its minimum by, a plane a bit.

A plane holds one bit of each of the pack's tokens, so a pack of n planes is n small words, and reading is a gather of
whole planes: exact sizes, no bit runs over a boundary.
Source: per-pack widths of PackKV, arXiv:2512.24449; planes instead of runs so that lanes load whole words.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.entropy_decode.formats import PlaneFormat, Planes

_WORDS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}


def widths(codes: jax.Array, fmt: PlaneFormat) -> jax.Array:
    """Planes of each pack, i32[*b, units, packs], for codes u8[*b, S, D]."""
    return _widths(_packs(codes, fmt))


def write(codes: jax.Array, num_planes: int, fmt: PlaneFormat) -> tuple[jax.Array, jax.Array]:
    """Return planes [*b, units, num_planes] and heads u8[*b, units, H] of codes u8[*b, S, D]; they must fit."""
    packs = _packs(codes, fmt)  # [*b, units, packs, tokens]
    width, low = _widths(packs), packs.min(-1)
    offset = jnp.cumsum(width, -1) - width
    above = (packs - low[..., None]).astype(jnp.uint32)
    place = _along_last(fmt.pack, above).astype(jnp.uint32)
    planes = jnp.zeros((width.size // width.shape[-1], num_planes), _WORDS[fmt.pack])
    unit = jnp.arange(planes.shape[0])[:, None]
    for k in range(fmt.code_bits):
        plane = (((above >> k) & 1) << place).sum(-1, dtype=jnp.uint32).astype(planes.dtype)
        at = jnp.where(k < width, offset + k, num_planes).reshape(unit.shape[0], -1)
        planes = planes.at[unit, at].set(plane.reshape(at.shape), mode="drop")
    heads = jnp.concatenate([_pack_bits(low, fmt.code_bits), _pack_bits(width, fmt.width_bits)], -1)
    return planes.reshape(*width.shape[:-1], num_planes), heads


def read(enc: Planes, fmt: PlaneFormat) -> jax.Array:
    """Undo `write`: codes u8[*b, S, D]."""
    low = _unpack_bits(enc.heads[..., : fmt.num_packs * fmt.code_bits // 8], fmt.code_bits)
    width = stored_widths(enc.heads, fmt)
    offset = jnp.cumsum(width, -1) - width
    codes = jnp.broadcast_to(low[..., None], (*low.shape, fmt.pack))
    for k in range(fmt.code_bits):
        plane = jnp.take_along_axis(enc.planes, offset + k, -1, mode="clip").astype(jnp.uint32)
        bit = ((plane[..., None] >> _along_last(fmt.pack, codes).astype(jnp.uint32)) & 1).astype(jnp.int32)
        codes = codes + jnp.where((k < width)[..., None], bit << k, 0)
    rounds = codes.reshape(*codes.shape[:-2], fmt.block // fmt.pack, fmt.head_dim, fmt.pack)
    return rounds.swapaxes(-1, -2).reshape(*codes.shape[:-3], -1, fmt.head_dim).astype(jnp.uint8)


def stored_widths(heads: jax.Array, fmt: PlaneFormat) -> jax.Array:
    """Planes of each pack, i32[*b, units, packs], as `write` stored them."""
    return _unpack_bits(heads[..., fmt.num_packs * fmt.code_bits // 8 :], fmt.width_bits)


def _packs(codes: jax.Array, fmt: PlaneFormat) -> jax.Array:
    """[*b, S, D] -> i32[*b, units, packs, tokens]."""
    *b, num_tokens, dim = codes.shape
    rounds = codes.reshape(*b, num_tokens // fmt.block, fmt.block // fmt.pack, fmt.pack, dim).swapaxes(-1, -2)
    return rounds.reshape(*rounds.shape[:-3], fmt.num_packs, fmt.pack).astype(jnp.int32)


def _widths(packs: jax.Array) -> jax.Array:
    """Bits of the largest code less the smallest, 0 where they are equal."""
    return 32 - jax.lax.clz(packs.max(-1) - packs.min(-1))


def _pack_bits(x: jax.Array, bits: int) -> jax.Array:
    """Numbers below 2**bits, [..., n] -> u8[..., n * bits / 8]: bit by bit, eight numbers a byte."""
    planes = (x[..., None, :] >> _along_last(bits, x)[..., None]) & 1  # [..., bits, n]
    eights = planes.reshape(*planes.shape[:-2], -1, 8)
    return (eights << _along_last(8, eights)).sum(-1).astype(jnp.uint8)


def _unpack_bits(packed: jax.Array, bits: int) -> jax.Array:
    """Undo `_pack_bits`: i32[..., n]."""
    eights = packed[..., None].astype(jnp.int32)
    planes = ((eights >> _along_last(8, eights)) & 1).reshape(*packed.shape[:-1], bits, -1)
    return (planes << _along_last(bits, packed)[..., None]).sum(-2)


def _along_last(n: int, x: jax.Array) -> jax.Array:
    """0 .. n - 1 along the last axis of x's rank."""
    return jnp.arange(n, dtype=jnp.int32).reshape(*(1,) * (x.ndim - 1), n)
