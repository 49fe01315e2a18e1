"""How quantised rows lie in memory: what every kernel that reads or writes codes agrees on."""

import dataclasses
from typing import Literal, NamedTuple

import jax


class Quantized(NamedTuple):
    """Rows of K or V as codes; x ~ codes * scale + zero_point."""

    codes: jax.Array  # u32[*b, S * bits // 32, D], see `packing`; u8[*b, S, D] at 8 bits
    scale: jax.Array  # [*b, S, D // group_size] per token, [*b, S // group_size, D] per channel
    zero_point: jax.Array | None  # as scale, in units of x; None when symmetric


@dataclasses.dataclass(frozen=True)
class Format:
    """What the arrays of a `Quantized` mean."""

    bits: int  # 2, 3, 4 or 8
    axis: Literal["token", "channel"]  # what one scale covers: channels of a token, or tokens of a channel
    group_size: int  # channels or tokens a scale covers
    symmetric: bool = False
    metadata_dtype: str = "float16"
    clip: float = 1.0  # a group's extremes are multiplied by it before they are fitted; readers need not know

    @property
    def num_levels(self) -> int:
        """Distinct codes; symmetric formats leave the last one out, so that zero is a code."""
        return 2**self.bits - 1 if self.symmetric else 2**self.bits

    @property
    def group_axis(self) -> int:
        """Axis of a split array along which one group runs."""
        return -1 if self.axis == "token" else -2

    def split(self, x: jax.Array) -> jax.Array:
        """[*b, S, D] -> [*b, S, D/g, g] per token, [*b, S/g, g, D] per channel."""
        *b, num_tokens, dim = x.shape
        if self.axis == "channel":
            return x.reshape(*b, num_tokens // self.group_size, self.group_size, dim)
        return x.reshape(*b, num_tokens, dim // self.group_size, self.group_size)
