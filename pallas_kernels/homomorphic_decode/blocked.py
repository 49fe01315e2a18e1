"""Homomorphic decode attention in plain JAX, a head and a block of slots at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels import rows, softmax_state
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.homomorphic_decode.partitions import block_diagonal, centre, split, to_int8, zero_point
from pallas_kernels.packing import unpack
from pallas_kernels.prefill.reference import capped


def homomorphic_decode(
    q: jax.Array,
    k: Quantized,
    v: Quantized,
    k_sums: jax.Array,
    v_sums: jax.Array,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    k_format: Format,
    v_format: Format,
    soft_cap: float | None,
    sliding_window: int | None,
) -> softmax_state.State:
    """See `api.homomorphic_decode`."""
    slots = rows.num_slots(k, k_format)
    block = rows.block_size(slots, k_format, v_format)

    def one_head(b: jax.Array, h: jax.Array) -> softmax_state.State:
        queries = to_int8(split(q[b, h].astype(jnp.float32), k_format.group_size))  # [G, R, g], [G, R, 1] twice

        def step(first: jax.Array, live: jax.Array, state: softmax_state.State) -> softmax_state.State:
            keys, values, ks, vs = (rows.cut(x, b, h, first, block, slots) for x in (k, v, k_sums, v_sums))
            logits = capped(_dot(queries, keys, ks, k_format), soft_cap)
            live = live & rows.cut_live(pos, q_pos, b, h, first, block, sliding_window)
            return softmax_state.update(state, logits, live, lambda p: _mix(p, values, vs, v_format))

        return rows.fold_blocks(length[b], slots, block, step, softmax_state.unit(q.shape[2:]))

    return rows.per_head(one_head, *q.shape[:2])


def _dot(queries: tuple[jax.Array, ...], k: Quantized, sums: jax.Array, fmt: Format) -> jax.Array:
    """Logits f32[R, P] of 8-bit queries and the keys of a block."""
    partitions, num_queries, _ = queries[0].shape
    spread, codes = block_diagonal(queries[0]), _signed(k, fmt)  # i8[G * R, D], i8[P, D]
    integers = jnp.einsum("ni,pi->np", spread, codes, preferred_element_type=jnp.int32)
    metadata = [x.T[:, None] for x in _metadata(k, sums, fmt)]  # [G, 1, P]
    return _expanded(integers.reshape(partitions, num_queries, -1), queries, metadata)


def _mix(p: jax.Array, v: Quantized, sums: jax.Array, fmt: Format) -> jax.Array:
    """p . V f32[R, D] of a block, with p f32[R, P] rounded to 8 bits."""
    rounded = to_int8(split(p, fmt.group_size))  # [N, R, g], ...
    integers = jnp.einsum("nri,nid->nrd", rounded[0], fmt.split(_signed(v, fmt)), preferred_element_type=jnp.int32)
    return _expanded(integers, rounded, [x[:, None] for x in _metadata(v, sums, fmt)])  # metadata [N, 1, D]


def _expanded(integers: jax.Array, a: tuple[jax.Array, ...], metadata: list[jax.Array]) -> jax.Array:
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
    """Codes i8[P, D] of a block."""
    return (unpack(enc.codes, fmt.bits).astype(jnp.int32) - centre(fmt)).astype(jnp.int8)
