"""Keys or values of the TPU kernel whose codes are decoded a tile at a time and from then on go as codes of 8 bits."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.entropy_decode.tpu_lanes import EIGHT, lanes
from pallas_kernels.quantized_decode.tpu_side import Scratch, Side, block_spec
from pallas_kernels.tpu_rows import LANES, pick, tokens_along_lanes, whole_lanes


class Stored(NamedTuple):
    """Coded rows, in memory or in a block."""

    parts: tuple[jax.Array, ...]  # [B, K, units, n], or [B, K, n, units] where XLA stores them so
    tables: jax.Array | None  # of all units, see `Reader.tables`
    scale: jax.Array
    zero_point: jax.Array


class CodedScratch(NamedTuple):
    """A block's units and a tile's codes."""

    scale: Any  # this and the next four as in `Scratch`
    offset: Any
    correction: Any
    codes: Any
    three: Any
    parts: tuple[Any, ...]  # i32[units, n], units along sublanes
    reader: Any  # the reader's own
    words: Any  # i32, four codes of a tile each, the first in the lowest byte: of a line, lines along lanes


class Reader(Protocol):
    """Decodes units of one storage."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Elements of a unit in each part."""

    @property
    def tables(self) -> tuple[int, int] | None:
        """Shape of the tables of a head, i32."""

    def arrays(self, x: Any) -> tuple[jax.Array, ...]:
        """The parts [B, K, units, n]."""

    def scratch(self, tile: int) -> tuple:
        """Memory of its own for a tile."""

    def prepare(self, parts: Any) -> None:
        """Make the units of a block ready."""

    def decode(self, parts: Any, tables: Any, scratch: Any, first: jax.Array, out: Any) -> None:
        """Write the codes of a tile's units, from unit `first` of the block on, see `CodedScratch.words`."""


@dataclasses.dataclass(frozen=True)
class Coded(Side):
    """Rows that `reader` decodes; see `tpu_decode.Side`."""

    reader: Reader
    unit: int  # tokens
    along_tokens: bool  # whether its lines are tokens; else they are channels
    shared: bool  # whether a unit has one scale; `fmt` then is that of a scale for each token

    @property
    def units(self) -> int:
        """Of a block."""
        return self.block // self.unit

    def arrays(self, x: Stored) -> Any:
        """Views of the arrays as the kernel reads them; none is a copy in the layouts that XLA chooses."""
        parts = tuple(part.swapaxes(-1, -2) if tokens_along_lanes(part.shape[-1]) else part for part in x.parts)
        return x._replace(parts=parts, scale=self.metadata_array(x.scale), zero_point=self.metadata_array(x.zero_point))

    def specs(self, x: Any, block_of) -> Any:
        """See `tpu_decode.Side`."""

        def part(width: int) -> pl.BlockSpec:
            along_lanes = tokens_along_lanes(width)
            return block_spec((width, self.units) if along_lanes else (self.units, width), along_lanes, block_of)

        metadata = block_spec((1, self.units), True, block_of) if self.shared else self.metadata_spec(block_of)
        tables = None
        if self.reader.tables is not None:
            tables = pl.BlockSpec((None, None, *self.reader.tables), lambda b, h, j, length: (b, h, 0, 0))
        return Stored(tuple(part(width) for width in self.reader.widths), tables, metadata, metadata)  # type: ignore[arg-type]

    def scratch(self, num_queries: int = 0) -> Any:
        """See `tpu_decode.Side`."""
        parts = tuple(pltpu.VMEM((self.units, whole_lanes(width)), jnp.int32) for width in self.reader.widths)
        tokens, channels = self.tile // self.unit * self.dim // 4, self.tile // 4
        words = (tokens, whole_lanes(self.unit)) if self.along_tokens else (channels, whole_lanes(self.dim))
        held: Scratch = super().scratch(num_queries)._replace(codes=None)
        return CodedScratch(*held, parts, self.reader.scratch(self.tile), pltpu.VMEM(words, jnp.int32))

    def prepare(self, x: Any, scratch: Any, live, q: jax.Array | None = None) -> None:
        """See `tpu_decode.Side`."""
        super().prepare(x, scratch, live, q)
        for width, part, out in zip(self.reader.widths, x.parts, scratch.parts, strict=True):
            wide = part[...]
            wide = lax.bitcast_convert_type(wide, jnp.int32) if wide.dtype == jnp.uint32 else wide.astype(jnp.int32)
            out[:, :width] = wide.T if tokens_along_lanes(width) else wide
        self.reader.prepare(scratch.parts)

    def metadata(self, x: Any, lanes) -> tuple[jax.Array, jax.Array]:
        """See `Side`; scales of units are spread over their tokens."""
        if not self.shared:
            return super().metadata(x, lanes)
        scale, zero_point = (self._spread(part, lanes.start) for part in (x.scale, x.zero_point))
        return super().metadata(x._replace(scale=scale, zero_point=zero_point), slice(None))

    def _spread(self, x: Any, first: jax.Array) -> jax.Array:
        """Scales [1, units] -> those of a tile's tokens from token `first` on, [1, T]."""
        held = [jnp.broadcast_to(x[:, i : i + LANES], EIGHT) for i in range(0, self.units, LANES)]
        chunks = [pick(held, (first + i + lanes()) // self.unit)[:1] for i in range(0, self.tile, LANES)]
        return jnp.concatenate(chunks, 1)

    def codes_of(self, x: Any, scratch: Any, i, dtype) -> jax.Array:
        """See `Side`."""
        first = i * (self.tile // self.unit)
        self.reader.decode(scratch.parts, x.tables, scratch.reader, first, scratch.words)
        if not self.along_tokens:
            words = lax.bitcast_convert_type(scratch.words[:, : self.dim], jnp.uint32)
            return self.unpacked(words, 8).astype(dtype)
        size, found = self.dim // 4, []
        for row in range(0, scratch.words.shape[0], size):
            words = scratch.words[row : row + size, : self.unit]
            codes = pltpu.bitcast(words ^ -0x7F7F7F80, jnp.int8)  # [D, tokens of a unit]
            found.append(codes.astype(jnp.float32).T)
        return jnp.concatenate(found).astype(dtype)
