"""Rotary position embedding as a cache needs to know it: how the keys of a layer were rotated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvcomp_jax.types import Constant
from pallas_kernels.rotary import cos_sin, turn


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Frequencies of one layer's rotations; see `turn` for the dimensions.

    Attributes:
      inv_freq: f32[n], radians a position.
      scale: What rotated dimensions are multiplied by beside; some extensions to longer contexts scale attention so.
      max_len: Tokens of text up to which these frequencies hold; None is any number.
    """

    inv_freq: Constant
    scale: float = 1.0
    max_len: int | None = None

    def __post_init__(self) -> None:
        if self.inv_freq.value.ndim != 1 or not self.scale > 0:
            raise ValueError(f"inv_freq {self.inv_freq} must be a vector, and scale={self.scale} positive.")

    @property
    def dim(self) -> int:
        """Leading dimensions of a head that rotate."""
        return 2 * len(self.inv_freq.value)

    @property
    def pairs(self) -> np.ndarray:
        """f32[2, n]: of each pair of dimensions the radians a position, and `scale`."""
        frequency = np.asarray(self.inv_freq.value, np.float32)
        return np.stack([frequency, np.full_like(frequency, self.scale)])

    def apply(self, x: jax.Array, pos: jax.Array) -> jax.Array:
        """Rotate x [*b, S, D] to positions i32[*b, S], f32; leading axes of pos may be 1."""
        cos, sin = self._angles(pos)
        return turn(x, cos * self.scale, sin * self.scale)

    def undo(self, x: jax.Array, pos: jax.Array) -> jax.Array:
        """Return what `apply` made x from."""
        cos, sin = self._angles(pos)
        return turn(x, cos / self.scale, -sin / self.scale)

    def turn_back(self, x: jax.Array, by: jax.Array) -> jax.Array:
        """Move x [*b, S, D], rotated already, `by` i32[*b, S] positions back, f32."""
        cos, sin = self._angles(by)
        return turn(x, cos, -sin)

    def average(self, x: jax.Array, first: jax.Array, num: int) -> jax.Array:
        """The mean of x [*b, S, D] rotated to each of `num` positions from `first` i32[*b, S] on, f32."""
        every = first[..., None] + jnp.arange(num).reshape(*(1,) * first.ndim, -1)
        cos, sin = (angle.mean(-2) for angle in self._angles(every))
        return turn(x, cos * self.scale, sin * self.scale)

    def _angles(self, pos: jax.Array) -> tuple[jax.Array, jax.Array]:
        frequency = jnp.asarray(self.inv_freq.value, jnp.float32).reshape(*(1,) * pos.ndim, -1)
        angle = pos[..., None].astype(jnp.float32) * frequency
        return cos_sin(angle)
