"""Blocks of rows as a large factor, which another codec stores, times a small one, which stays exact."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kvcomp_jax.codecs.base import Codec, Encoded
from kvcomp_jax.types import pytree, static

_SMALLEST = 1e-6  # relative to the largest singular value, and absolute: what float32 sees of a Gram matrix


class Factors(NamedTuple):
    """Rows of K or V as a tensor train of two sites."""

    large: Encoded  # of rows [*b, S, D], as the codec of the large factor stores them
    small: jax.Array  # [*b, S // block_size, bases, rank, rank]


@pytree
class TensorTrain(Codec):
    """Factor each block of tokens into L M, store L by the codec `large` and M, rank x rank, as it is.

    Rows are cut into D // rank runs of consecutive channels; all runs of a block together are a tall matrix Y with the
    singular values S. L = Y V S^-1/2 and M = S^1/2 V^T: what is large in some channel of a run moves into M, and L has
    a narrower range. Nothing is truncated, so without quantisation the product is exact. Helps where outlier channels
    stand at the same place of every run, or with a basis a run; not with Gaussian rows.
    A read multiplies a query by M once a block, and the block's result, never a key.
    Source: DecoQuant, Liu et al. 2024, arXiv:2405.12591 (matrix product operator of two sites); factors by block and KV
    head, where the released code has one for all heads of a prompt.

    Attributes:
      large: Codec of the large factor.
      rank: Channels of a run; divides head_dim.
      block_size: Tokens that are factored together.
      basis: "shared" by the runs of a row, or one "run" each.
      dtype: Of the small factor.
    """

    large: Codec
    rank: int = static(default=16)
    block_size: int = static(default=256)
    basis: Literal["shared", "run"] = static(default="shared")
    dtype: str = static(default="float16")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.block_size < 1:
            raise ValueError(f"rank={self.rank} and block_size={self.block_size} of a TensorTrain must be positive.")
        if self.basis not in ("shared", "run"):
            raise ValueError(f"basis={self.basis!r} must be 'shared' or 'run'.")

    @property
    def unit(self) -> int:
        """A block."""
        return self.block_size

    @property
    def uses_pos(self) -> bool:
        """The large factor's."""
        return self.large.uses_pos

    @property
    def name(self) -> str:
        """TensorTrain(large)."""
        return f"{type(self).__name__}({self.large.name})"

    def encode(self, x: jax.Array, pos: jax.Array) -> Factors:
        """Factor and quantise x [*b, S, D]; S a multiple of `unit`."""
        large, small = factor(self._blocks(x, -2), self.rank, self.basis)
        limit = float(jnp.finfo(self.dtype).max)
        return Factors(
            self.large.encode(large.reshape(x.shape), pos), jnp.clip(small, -limit, limit).astype(self.dtype)
        )

    def decode(self, enc: Factors, pos: jax.Array) -> jax.Array:
        """Return L M, f32[*b, S, D]."""
        large = self.large.decode(enc.large, pos)
        return _multiply(self._blocks(large, -2), enc.small).reshape(large.shape)

    def dot(self, q: jax.Array, enc: Factors, pos: jax.Array) -> jax.Array:
        """Return (q M^T) . L^T block by block."""
        num_blocks = enc.small.shape[-4]
        turned = _multiply(q.astype(jnp.float32)[..., None, :, :], enc.small.mT)  # [*b, N, R, D]
        logits = self.large.dot(turned, self._split(enc.large, num_blocks, q.ndim - 2), self._blocks(pos, -1))
        logits = jnp.moveaxis(logits, -3, -2)  # [*b, R, N, P]
        return logits.reshape(*logits.shape[:-2], -1)

    def mix(self, p: jax.Array, enc: Factors, pos: jax.Array) -> jax.Array:
        """Return the sum over blocks of (p . L) M."""
        num_blocks = enc.small.shape[-4]
        by_block = jnp.moveaxis(p.reshape(*p.shape[:-1], num_blocks, -1), -2, -3)  # [*b, N, R, P]
        mixed = self.large.mix(by_block, self._split(enc.large, num_blocks, p.ndim - 2), self._blocks(pos, -1))
        return _multiply(mixed, enc.small).sum(-3)

    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """Bits of both factors; `num_tokens` counts in whole blocks."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return self.large.nbits(num_tokens, head_dim) + self._small_bits(num_tokens, head_dim)

    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """The large factor's and the small factor."""
        num_tokens = -(-num_tokens // self.unit) * self.unit
        return self.large.metadata_bits(num_tokens, head_dim) + self._small_bits(num_tokens, head_dim)

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if rank does not divide head_dim, a block has fewer runs than rank, or `large` objects."""
        if head_dim % self.rank:
            raise ValueError(f"rank={self.rank} must divide head_dim={head_dim}.")
        if (runs := self.block_size * (head_dim // self.rank if self.basis == "shared" else 1)) < self.rank:
            raise ValueError(
                f"rank={self.rank} must not exceed {runs}, the runs of block_size={self.block_size} tokens in a basis."
            )
        self.large.check(head_dim, self.block_size)
        super().check(head_dim, block_size)

    def bind(self, dtype: Any) -> "TensorTrain":
        """Bind the large factor's codec."""
        return dataclasses.replace(self, large=self.large.bind(dtype))

    def _blocks(self, x: jax.Array, axis: int) -> jax.Array:
        """Cut the axis of tokens into blocks: [.., S, ..] -> [.., N, P, ..]."""
        axis %= x.ndim
        return x.reshape(*x.shape[:axis], -1, self.block_size, *x.shape[axis + 1 :])

    def _split(self, enc: Encoded, num_blocks: int, axis: int) -> Encoded:
        """Cut the rows of an encoding, which follow `axis` leading axes, into blocks."""
        return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], num_blocks, -1, *x.shape[axis + 1 :]), enc)

    def _small_bits(self, num_tokens: int, head_dim: int) -> int:
        bases = 1 if self.basis == "shared" else head_dim // self.rank
        return num_tokens // self.block_size * bases * self.rank**2 * jnp.dtype(self.dtype).itemsize * 8


def factor(x: jax.Array, rank: int, basis: Literal["shared", "run"] = "shared") -> tuple[jax.Array, jax.Array]:
    """Factor x [*b, P, D] into L f32[*b, P, D] and M f32[*b, bases, rank, rank] in the balanced gauge.

    Each run of `rank` channels of x is that of L times M; L^T L = M M^T = S, diagonal, over the runs of a basis.
    S and V come from the Gram matrix in float32. Singular values that it cannot see are raised to what it can, in both
    factors alike, so the product stays exact.
    """
    *b, num_tokens, dim = x.shape
    bases = 1 if basis == "shared" else dim // rank
    runs = x.astype(jnp.float32).reshape(*b, num_tokens, bases, dim // rank // bases, rank)
    gram = jnp.einsum("...pnci,...pncj->...nij", runs, runs, precision="highest")
    squares, v = jnp.linalg.eigh(gram)
    s = jnp.sqrt(jnp.maximum(squares, 0.0))
    root = jnp.sqrt(jnp.maximum(s, _SMALLEST * s[..., -1:]) + _SMALLEST)[..., None, :]  # [*b, bases, 1, rank]
    return _multiply(x, v / root), (v * root).mT


def _multiply(rows: jax.Array, small: jax.Array) -> jax.Array:
    """Multiply the runs of rows [*b, R, D] by their basis [*b, bases, rank, rank]; leading axes broadcast."""
    *_, bases, rank, _ = small.shape
    runs = rows.astype(jnp.float32).reshape(*rows.shape[:-1], bases, -1, rank)
    lead = jnp.broadcast_shapes(runs.shape[:-4], small.shape[:-3])
    runs = jnp.broadcast_to(runs, (*lead, *runs.shape[-4:]))
    out = jnp.einsum("...pnci,...nij->...pncj", runs, small.astype(jnp.float32), precision="highest")
    return out.reshape(*out.shape[:-3], -1)
