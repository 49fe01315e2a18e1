"""Keys as they were before their rotary position embedding."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.base import Encoded
from kvcomp_jax.codecs.wrapper import Wrapper
from kvcomp_jax.rotary import Rotary
from kvcomp_jax.types import pytree, static
from pallas_kernels.codebook_decode.rows import CodebookRows


@pytree
class PreRope(Wrapper):
    """Undo the rotation of keys before the inner codec stores them, and apply it to what it decodes.

    Rotation mixes channels by an angle that depends on the position, which smears the channels that hold outliers.
    Reads rotate a block of decoded keys: n cosines and sines a token, shared by the heads where `pos` is.
    Source: KVQuant, Hooper et al. 2024, arXiv:2401.18079, section 3.2.
    """

    rope: Rotary = static()

    @property
    def uses_pos(self) -> bool:
        """True: rotation goes by it."""
        return True

    def encode(self, x: jax.Array, pos: jax.Array) -> Encoded:
        """Encode keys x [*b, S, D] that stand, rotated, at pos."""
        return self.inner.encode(self.rope.undo(x, pos), pos)

    def decode(self, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return the keys rotated to pos, f32[*b, S, D]."""
        return self.rope.apply(self.inner.decode(enc, pos), pos)

    def codebook_rows(self, enc: Encoded) -> CodebookRows | None:
        """The inner codec's, which then rotate."""
        rows = self.inner.codebook_rows(enc)
        return None if rows is None or rows.rope is not None else rows._replace(rope=self.rope.pairs)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if more dimensions rotate than a head has, or the inner codec cannot store the rows."""
        if self.rope.dim > head_dim:
            raise ValueError(f"a rope of {self.rope.dim} dimensions does not fit head_dim={head_dim}.")
        self.inner.check(head_dim, block_size)

    def fit(self, x: jax.Array, live: jax.Array) -> Self:
        """Fit the inner codec to a prompt that starts at position 0, before its rotation."""
        pos = jnp.arange(x.shape[-2], dtype=jnp.int32).reshape(*(1,) * (x.ndim - 2), -1)
        return dataclasses.replace(self, inner=self.inner.fit(self.rope.undo(x, pos), live))
