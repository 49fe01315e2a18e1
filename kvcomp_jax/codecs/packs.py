"""Packing by width: a few tokens of one channel take as many bits as their range needs."""

import jax

from kvcomp_jax.codecs.base import Encoded
from kvcomp_jax.codecs.budgeted import Budgeted
from kvcomp_jax.types import pytree, static
from pallas_kernels.entropy_decode import planes, rows
from pallas_kernels.entropy_decode.formats import PlaneFormat, Planes


@pytree
class Packed:
    """A slot a unit, see `Planes`, and the inner codec's metadata."""

    planes: jax.Array  # u8, u16 or u32[*b, units, W]
    heads: jax.Array  # u8[*b, units, H]
    metadata: Encoded
    head_dim: int = static()


@pytree
class Packs(Budgeted):
    """Store each pack of `pack` tokens of a channel as its smallest code and just enough bits for the rest.

    Channels are stable over tokens, so packs are narrow where rows are not; a constant pack takes no payload at all.
    Decoding gathers whole words, without a serial walk. Metadata is a minimum and a width a pack.
    Source: PackKV, arXiv:2512.24449, section on bit packing; bit planes here, runs of bits there: the same size.
    """

    pack: int = static(default=16)

    def __post_init__(self) -> None:
        if self.pack not in (8, 16, 32) or self.block % self.pack:
            raise ValueError(
                f"pack={self.pack} must be 8, 16 or 32 tokens, planes of whole bytes, and divide block={self.block}."
            )
        super().__post_init__()

    def format(self, head_dim: int) -> PlaneFormat:
        """How packs of rows of `head_dim` lie."""
        return PlaneFormat(self.block, head_dim, self.pack, self.inner.code_bits())

    def encode(self, x: jax.Array, pos: jax.Array) -> Packed:
        """Pack x [*b, S, D]; S a multiple of `block`."""
        del pos
        fmt = self.format(x.shape[-1])
        room = self._planes(x.shape[-1])
        codes, metadata, _ = self.fitting(x, room, lambda codes, j: planes.widths(codes, fmt).sum(-1))
        stored, heads = planes.write(codes, room, fmt)
        return Packed(planes=stored, heads=heads, metadata=metadata, head_dim=x.shape[-1])

    def decode(self, enc: Packed, pos: jax.Array) -> jax.Array:
        """Return the inner codec's rows, f32[*b, S, D]."""
        del pos
        return rows.decoded(*self.operands(enc))

    def operands(self, enc: Packed) -> tuple[Planes, None, PlaneFormat]:
        """What the products of `entropy_decode` take: arrays, no tables, format."""
        stored = Planes(enc.planes, enc.heads, *self.inner.grid(enc.metadata))
        return stored, None, self.format(enc.head_dim)

    def spare_bits(self, enc: Packed) -> jax.Array:
        """Bits of each slot's planes that no pack uses, i32[*b, units]."""
        width = planes.stored_widths(enc.heads, self.format(enc.head_dim))
        return self.slot_bits(enc.head_dim) - self.pack * width.sum(-1)

    def slot_bits(self, head_dim: int) -> int:
        """Bits of the planes of a unit: `budget` a value, and at least plain packing."""
        return self.pack * self._planes(head_dim)

    def head_bits(self, head_dim: int) -> int:
        """A minimum and a width a pack."""
        return 8 * self.format(head_dim).head_bytes

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if the minima of a unit do not fill whole bytes."""
        if self.format(head_dim).num_packs % 8:
            raise ValueError(f"head_dim={head_dim} makes {self.format(head_dim).num_packs} packs of a unit of "
                             f"{self.block} tokens, which must be a multiple of 8; take a larger block.")  # fmt: skip
        super().check(head_dim, block_size)

    def _planes(self, head_dim: int) -> int:
        """Planes of a slot."""
        bits = self.inner.plain_bits(self.budget)
        return int(max(self.budget or 0, bits) * self.format(head_dim).num_packs)
