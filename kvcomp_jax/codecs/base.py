"""The contract of a codec: an approximate linear operator on rows of K or V."""

import abc
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.codebook_decode.rows import CodebookRows

Encoded = Any  # a pytree of arrays [*b, rows, ...]; rows is proportional to the tokens encoded


class Codec(abc.ABC):
    """How rows of K or V are stored. Subclasses are `types.pytree`s with static fields.

    `decode` defines the codec; `dot` and `mix` are the two contractions that attention needs and must agree with it:
    dot(q, enc) = rounded_query(q) . decode(enc)^T and mix(p, enc) = rounded_probs(p) . decode(enc), up to float32.
    Every array of an encoding is [*b, rows, ...] with rows proportional to tokens, so that encodings of consecutive
    units of tokens concatenate along that axis; this is what lets blocks move between rungs without re-encoding.
    Where a codec joins the heads of a token, the last of *b, the heads, is 1.
    Positions are i32[*b, S]; in reads their last leading axis may be 1 where heads share them.
    """

    @property
    @abc.abstractmethod
    def unit(self) -> int:
        """Tokens that are encoded inseparably: 1 when every token stands alone."""

    @property
    def joins_heads(self) -> bool:
        """Whether the heads of a token are stored together, so that all must hold the same tokens."""
        return False

    @property
    def uses_pos(self) -> bool:
        """Whether text positions matter to this codec, so that rungs must remember them."""
        return False

    @property
    def fits(self) -> bool:
        """Whether `fit` takes parameters from a prompt, so that its first tokens are stored by what later ones are."""
        return False

    @abc.abstractmethod
    def encode(self, x: jax.Array, pos: jax.Array) -> Encoded:
        """Encode x [*b, S, D] whose tokens stand at text positions pos i32[*b, S]; S is a multiple of `unit`."""

    @abc.abstractmethod
    def decode(self, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return the approximation [*b, S, D] of what was encoded."""

    @abc.abstractmethod
    def nbits(self, num_tokens: int, head_dim: int) -> int:
        """Bits that `num_tokens` tokens of one head occupy, payload and metadata, exactly."""

    @abc.abstractmethod
    def metadata_bits(self, num_tokens: int, head_dim: int) -> int:
        """The part of `nbits` that is not codes."""

    def size(self, num_tokens: int, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
        """Bits that `num_tokens` tokens of all heads occupy, and the part of them that is not codes, exactly."""
        return (
            num_kv_heads * self.nbits(num_tokens, head_dim),
            num_kv_heads * self.metadata_bits(num_tokens, head_dim),
        )

    def spare_bits(self, enc: Encoded) -> jax.Array | None:
        """Bits that a slot of fixed size holds beyond what its data take, i32[*b, units]; None where all is taken.

        They count as allocated, not as used. `nbits` includes them.
        """
        del enc
        return None

    def dot(self, q: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return q . K^T, f32[*b, R, S], for q [*b, R, D]."""
        k = self.decode(enc, pos)
        return jnp.einsum("...rd,...sd->...rs", q.astype(k.dtype), k, preferred_element_type=jnp.float32)

    def mix(self, p: jax.Array, enc: Encoded, pos: jax.Array) -> jax.Array:
        """Return p . V, f32[*b, R, D], for p f32[*b, R, S]."""
        v = self.decode(enc, pos)
        return jnp.einsum("...rs,...sd->...rd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)

    @property
    def stored(self) -> "Codec":
        """The codec that the encoding is of, in the basis it is kept in; a codec that only turns rows names its inner.

        `dot(q, ...)` is `stored.dot(enter(q), ...)` and `mix(p, ...)` is `leave(stored.mix(p, ...))`, so that a read
        changes its basis once, whatever kernel does the rest.
        """
        return self

    def enter(self, q: jax.Array) -> jax.Array:
        """Bring queries [*b, R, D] to the basis of `stored`."""
        return q

    def leave(self, mixed: jax.Array) -> jax.Array:
        """Bring sums of stored rows [*b, R, D] back from the basis of `stored`."""
        return mixed

    @property
    def name(self) -> str:
        """What people call it; wrappers name what they wrap."""
        return type(self).__name__

    def rounded_query(self, q: jax.Array) -> jax.Array:
        """Return what `dot` takes q [*b, R, D] for: q itself, unless it multiplies in integers and rounds q first."""
        return q

    def rounded_probs(self, p: jax.Array) -> jax.Array:
        """Return what `mix` takes p [*b, R, S] for: p itself, unless it multiplies in integers and rounds p first."""
        return p

    @property
    def kind(self) -> Any:
        """What a fused read is looked up by: the type, and whatever else its arithmetic depends on."""
        return type(self)

    def codebook_rows(self, enc: Encoded) -> CodebookRows | None:
        """The same encoding as operands of `codebook_decode`, without any arithmetic; None if they cannot express it.

        A wrapper adds its part to the inner codec's, where that part comes later in the order that `CodebookRows` has.
        """
        del enc
        return None

    def check(self, head_dim: int, block_size: int) -> None:
        """Raise ValueError if rows of `head_dim` or blocks of `block_size` tokens cannot be encoded."""
        del head_dim
        if block_size % self.unit:
            raise ValueError(
                f"block_size={block_size} must be a multiple of {self.unit}, the tokens that {self} encodes together."
            )

    def bind(self, dtype: Any) -> "Codec":
        """Return this codec for input rows of `dtype`; most need not know."""
        del dtype
        return self

    def prepare(self, batch: int, num_kv_heads: int, head_dim: int) -> "Codec":
        """Return this codec with its parameters as arrays [B, K, ...], as an empty cache has them; most have none.

        A codec in a `LayerSpec` is static: its array fields are None, and what was calibrated is a `types.Constant`.
        In a cache they are arrays that lead with B like all others, so that each row may have its own.
        """
        del batch, num_kv_heads, head_dim
        return self

    def fit(self, x: jax.Array, live: jax.Array) -> "Codec":
        """Return this codec with the parameters that suit a prompt; most have none.

        Every rung of a cache fits to the whole prompt, so codecs of equal static fields have equal parameters there.

        Args:
          x: Rows [B, K, S, D] of a whole prompt, before they are ranked.
          live: bool[B, 1, S], which of them are tokens.
        """
        del x, live
        return self
