"""Decode attention over packed rows on CPU: a custom call compiled by Numba, on XLA's threads."""

import functools
import hashlib
import os

import jax
import jax.numpy as jnp

from pallas_kernels import xla_cpu
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.quantized_decode.cpu.kernel import make_run
from pallas_kernels.quantized_decode.cpu.plan import Plan
from pallas_kernels.quantized_decode.cpu.tiles import LANES, unit

_VERSION = 1  # of the kernel: XLA's persistent caches know a kernel by its name alone


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
    batch, num_heads, rows, head_dim = q.shape
    value_dim = v.codes.shape[-1]
    _check(k_format, head_dim)
    _check(v_format, value_dim)
    plan = Plan(k_format, v_format, head_dim, value_dim, rows, soft_cap, pos is not None, sliding_window)
    num_slots = k.scale.shape[2] * (k_format.group_size if k_format.axis == "channel" else 1)
    splits = _num_splits(batch * num_heads, num_slots, plan.block)
    state = (batch, num_heads, splits, rows)
    results = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*state, value_dim), state, state))
    nowhere = jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    places = nowhere if pos is None or q_pos is None else (pos, q_pos)
    operands = (q.astype(jnp.float32), *_rows(k), *_rows(v), length, *places)
    acc, top, total = xla_cpu.call(_target(plan), results, batch * num_heads * splits, *operands)
    new_top = top.max(2)
    keep = jnp.exp(top - new_top[:, :, None])
    return (acc * keep[..., None]).sum(2), new_top, (total * keep).sum(2)


def _check(fmt: Format, dim: int) -> None:
    if dim % LANES or (fmt.axis == "token" and fmt.group_size % LANES):
        raise Unsupported(f"the cpu backend sums {LANES} channels at a time; got {dim} channels in {fmt}.")
    if fmt.axis == "channel" and fmt.group_size % unit(fmt.bits):
        raise Unsupported(f"the cpu backend reads {unit(fmt.bits)} tokens of {fmt.bits} bits at a time; got {fmt}.")


def _num_splits(heads: int, num_slots: int, block: int) -> int:
    """Shares of the slots: a few tasks for each core, none shorter than four blocks."""
    wanted = -(-4 * (os.cpu_count() or 1) // heads)
    return max(1, min(wanted, num_slots // (4 * block)))


def _rows(enc: Quantized) -> tuple[jax.Array, jax.Array, jax.Array]:
    return enc.codes, enc.scale, enc.scale if enc.zero_point is None else enc.zero_point


@functools.cache
def _target(plan: Plan) -> str:
    """Compile a kernel, once for a configuration; returns its name, which is the same in every process."""
    name = f"kvcomp_quantized_decode_{hashlib.sha256(f'{_VERSION} {plan}'.encode()).hexdigest()[:24]}"
    xla_cpu.register(name, make_run(plan))
    return name
