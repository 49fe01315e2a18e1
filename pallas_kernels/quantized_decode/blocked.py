"""Decode attention over packed rows in plain JAX: a block is decoded, used and forgotten.

Float products after all: XLA's CPU backend decodes a block of values and multiplies it in 3.8 ms of processor time
where integer products of 16-bit probabilities take 9 (and 27 with several scales a token); for keys the two are even.
Keys stand on the left of their product, which is a quarter faster than on the right.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import fold_blocks
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.packing import pack_unit
from pallas_kernels.prefill.reference import MASK_VALUE, capped
from pallas_kernels.quantize_pack.reference import dequantize
from pallas_kernels.quantized_decode.block_sizes import BLOCKED
from pallas_kernels.quantized_decode.reference import live_slots


def quantized_decode(
    q: jax.Array,
    k: Quantized,
    v: Quantized,
    length: jax.Array,
    pos: jax.Array | None,
    q_pos: jax.Array | None,
    *,
    k_format: Format,
    v_format: Format,
    soft_cap: float | None,
    sliding_window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.quantized_decode`."""
    q = q.astype(jnp.float32)
    num_slots = k.codes.shape[2] * 32 // k_format.bits if k_format.bits < 8 else k.codes.shape[2]
    size = min(num_slots, math.lcm(BLOCKED, _unit(k_format), _unit(v_format)))

    def cut(j: jax.Array) -> tuple[Quantized, Quantized, jax.Array | None]:
        first = jnp.minimum(j * size, num_slots - size)  # the last block is moved back to end at S
        here = None if pos is None else lax.dynamic_slice_in_dim(pos, first, size, 2)
        return _block(k, j, size, num_slots), _block(v, j, size, num_slots), here

    def step(j: jax.Array, block: tuple[Quantized, Quantized, jax.Array | None], state: tuple) -> tuple:
        (keys, values, here), (acc, top, total) = block, state
        slots = jnp.minimum(j * size, num_slots - size) + jnp.arange(size)
        rows = dequantize(keys, k_format)  # [B, K, P, D]
        logits = lax.dot_general(rows, q, (((3,), (3,)), ((0, 1), (0, 1)))).swapaxes(2, 3)  # [B, K, R, P]
        live = live_slots(length, here, q_pos, slots, sliding_window) & (slots >= j * size)[None, None, None]
        logits = jnp.where(live, capped(logits, soft_cap), MASK_VALUE)
        new_top = jnp.maximum(top, logits.max(-1))
        keep = jnp.exp(top - new_top)
        p = jnp.where(live, jnp.exp(logits - new_top[..., None]), 0.0)
        acc = acc * keep[..., None] + jnp.einsum("bkrs,bksd->bkrd", p, dequantize(values, v_format))
        return acc, new_top, total * keep + p.sum(-1)

    rows = q.shape[:3]
    start = jnp.zeros((*rows, v.codes.shape[-1])), jnp.full(rows, MASK_VALUE), jnp.zeros(rows)
    num_blocks = (jnp.minimum(length.max(), num_slots) + size - 1) // size
    return fold_blocks(num_blocks, cut, step, start, ahead=3 in (k_format.bits, v_format.bits))


def _unit(fmt: Format) -> int:
    """Tokens that cannot be cut apart."""
    return math.lcm(pack_unit(fmt.bits), fmt.group_size if fmt.axis == "channel" else 1)


def _block(enc: Quantized, j: jax.Array, size: int, num_slots: int) -> Quantized:
    """Block j of `size` tokens; the last one is moved back to end at S."""

    def cut(x: jax.Array) -> jax.Array:
        rows = x.shape[2] * size // num_slots
        return lax.dynamic_slice_in_dim(x, jnp.minimum(j * rows, x.shape[2] - rows), rows, 2)

    return jax.tree.map(cut, enc)
