"""Packs of bit planes on TPUs: which word is whose plane follows from the widths of the packs before it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.entropy_decode.formats import PlaneFormat, Planes
from pallas_kernels.entropy_decode.tpu_lanes import EIGHT, before, lanes, registers
from pallas_kernels.tpu_rows import LANES, SUBLANES, pick


@dataclasses.dataclass(frozen=True)
class PlanesReader:
    """See `tpu_side.Reader`; the two parts are planes and heads."""

    fmt: PlaneFormat
    num_planes: int  # words of a unit

    @property
    def widths(self) -> tuple[int, int]:
        """See `tpu_side.Reader`."""
        return self.num_planes, self.fmt.head_bytes

    @property
    def tables(self) -> tuple[int, int] | None:
        """See `tpu_side.Reader`."""
        return None

    def scratch(self, tile: int) -> tuple:
        """See `tpu_side.Reader`."""
        return ()

    def arrays(self, x: Planes) -> tuple[jax.Array, ...]:
        """See `tpu_side.Reader`."""
        return x.planes, x.heads

    @property
    def together(self) -> int:
        """Planes that a word has room for."""
        return 32 // self.fmt.pack

    def prepare(self, parts: Any) -> None:
        """See `tpu_side.Reader`: next to each plane those after it, so that one pick finds several."""
        planes, _ = parts
        alone = words = planes[...]
        for n in range(1, self.together):
            words |= jnp.concatenate([alone[:, n:], alone[:, :n]], 1) << n * self.fmt.pack
        planes[...] = words

    def decode(self, parts: Any, tables: Any, scratch: Any, first: jax.Array, out: Any) -> None:
        """See `tpu_side.Reader`."""
        planes, heads = parts
        unit_rows = self.fmt.block // 4
        for eight in range(out.shape[0] // (SUBLANES * unit_rows)):
            self._eight(planes, heads, first + eight * SUBLANES, out, eight * SUBLANES * unit_rows)

    def _eight(self, planes: Any, heads: Any, unit: jax.Array, out: Any, row: int) -> None:
        """Write the words of four tokens each of eight units from row `row` of `out` on."""
        fmt, offset = self.fmt, jnp.zeros((SUBLANES, 1), jnp.int32)
        words = fmt.pack // 4  # of a pack
        for turn in range(fmt.block // fmt.pack):
            for channel in range(0, fmt.head_dim, LANES):
                number = turn * fmt.head_dim + channel
                count = min(LANES, fmt.head_dim - channel)
                low = self._numbers(heads, unit, 0, fmt.code_bits, number)
                width = self._numbers(heads, unit, fmt.num_packs * fmt.code_bits, fmt.width_bits, number)
                width = jnp.where(lanes() < count, width, 0)
                here = offset + before(width)
                offset = offset + width.sum(1, keepdims=True)
                found = self._planes(planes, unit, here, width, number + count)
                for word in range(words):
                    codes = low * 0x01010101
                    for k, plane in enumerate(found):
                        codes += (((plane >> 4 * word) & 15) * 0x00204081 & 0x01010101) << k
                    rows = pl.ds(row + turn * words + word, SUBLANES, stride=fmt.block // 4)
                    out[rows, channel : channel + LANES] = codes

    def _planes(self, planes: Any, unit: jax.Array, first: jax.Array, width: jax.Array, packs: int) -> list[jax.Array]:
        """Planes of packs that begin at `first`, 0 where a pack has none; `packs` come so far in the unit."""
        last, found = min(packs * self.fmt.code_bits, self.num_planes) - 1, []
        for k in range(self.fmt.code_bits):
            if k % self.together == 0:
                words = pick(registers(planes, unit, 0, last), first + k)
            plane = lax.shift_right_logical(words, k % self.together * self.fmt.pack)
            found.append(jnp.where(k < width, plane, 0))
        return found

    def _numbers(self, heads: Any, unit: jax.Array, first_bit: int, bits: int, number: int) -> jax.Array:
        """Numbers `number` .. + 128 of those stored from bit `first_bit` on, one bit of all after another."""
        found, most = jnp.zeros(EIGHT, jnp.int32), self.fmt.head_bytes - 1
        for k in range(bits):
            bit = first_bit + k * self.fmt.num_packs + number
            at, low, high = bit + lanes(), min(bit // 8, most), min((bit + LANES - 1) // 8, most)
            byte = pick(registers(heads, unit, low, high), at >> 3, low // LANES)
            found |= ((byte >> (at & 7)) & 1) << k
        return found
