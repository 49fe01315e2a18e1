"""The two products of attention on integer codes, for one head and any number of slots.

Each is an integer product a partition, corrected by the sums of codes: see `partitions`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats import Format, Quantized
from pallas_kernels.homomorphic_decode.partitions import block_diagonal, centre, split, to_int8, zero_point
from pallas_kernels.packing import unpack

Rounded = tuple[jax.Array, jax.Array, jax.Array]  # codes i8[G, R, size], scale and offset f32[G, R, 1]


def rounded_queries(q: jax.Array, fmt: Format) -> Rounded:
    """Queries [R, D] at 8 bits a partition of the keys' groups."""
    return to_int8(split(q.astype(jnp.float32), fmt.group_size))


def dot(queries: Rounded, k: Quantized, sums: jax.Array, fmt: Format) -> jax.Array:
    """Logits f32[R, P] of 8-bit queries [R, D] and keys [P, D] that group per token."""
    partitions, num_queries, _ = queries[0].shape
    spread, codes = block_diagonal(queries[0]), _signed(k, fmt)  # i8[G * R, D], i8[P, D]
    integers = jnp.einsum("ni,pi->np", spread, codes, preferred_element_type=jnp.int32)
    metadata = [x.T[:, None] for x in _metadata(k, sums, fmt)]  # [G, 1, P]
    return _expanded(integers.reshape(partitions, num_queries, -1), queries, metadata)


def mix(p: jax.Array, v: Quantized, sums: jax.Array, fmt: Format) -> jax.Array:
    """p . V f32[R, D] for p f32[R, P], rounded to 8 bits here, and values [P, D] that group per channel."""
    rounded = to_int8(split(p, fmt.group_size))
    integers = jnp.einsum("nri,nid->nrd", rounded[0], fmt.split(_signed(v, fmt)), preferred_element_type=jnp.int32)
    return _expanded(integers, rounded, [x[:, None] for x in _metadata(v, sums, fmt)])  # metadata [N, 1, D]


def _expanded(integers: jax.Array, a: Rounded, metadata: list[jax.Array]) -> jax.Array:
    """Sum over partitions what integer products [G, R, columns] stand for."""
    codes, a_scale, a_offset = a
    scale, offset, sums = metadata
    a_sums = codes.astype(jnp.int32).sum(-1, keepdims=True).astype(jnp.float32)
    by_scale = a_scale * integers.astype(jnp.float32) + a_offset * sums
    by_offset = a_scale * a_sums + a_offset * codes.shape[-1]
    return (by_scale * scale + by_offset * offset).sum(0)


def _metadata(enc: Quantized, sums: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scale, offset and code sums of `_signed` codes, in float32."""
    scale, middle = enc.scale.astype(jnp.float32), centre(fmt)
    offset = zero_point(enc, scale, fmt) + middle * scale
    return scale, offset, sums.astype(jnp.float32) - middle * fmt.group_size


def _signed(enc: Quantized, fmt: Format) -> jax.Array:
    """Codes i8[P, D], recentred where 8 bits do not fit."""
    return (unpack(enc.codes, fmt.bits).astype(jnp.int32) - centre(fmt)).astype(jnp.int8)
