"""Quantisation to packed codes in Pallas Mosaic GPU, Hopper and newer: x is read once, by the copy engine.

A block takes up to 4 groups of tokens (scales per channel) or units of 32 tokens (per token), one or more a warp. A
thread works on the same channels of all its tokens, so that it has all codes of its words; the channels of a token
that share a scale lie in neighbouring threads.

Every rounding is the reference's: exact division, ties to even, and no product contracted with a sum where that would
change a bit.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.mosaic_gpu import LANES, WARPS, Machine, Registers, require_hopper
from pallas_kernels.quantize_pack.block_sizes import HOPPER_BYTES

UNIT = 32  # tokens whose words lie together at any width


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a call is cut: x is [units, tokens, *channels], a block takes `per_block` units and `width` channels."""

    machine: Machine
    fmt: Format
    units: int
    tokens: int  # of a unit: a group's, or 32
    channels: tuple[int, ...]  # (D,), or (groups, channels of a group)
    per_block: int
    width: int  # of the first axis of channels

    @property
    def code_rows(self) -> int:
        """Rows of words, or of bytes, of a unit."""
        return self.tokens if self.fmt.bits == 8 else self.tokens * self.fmt.bits // 32

    @property
    def registers(self) -> Registers:
        """Where one token of each unit goes, [*units_axis, *channels of a block]."""
        shape = (self.width, *self.channels[1:])
        split = math.gcd(WARPS // self.per_block, shape[0])
        axes: list[tuple] = []
        names: list[str] = []
        lanes = LANES
        for i, size in reversed(list(enumerate(shape))):
            size //= split if i == 0 else 1
            even = size & -size
            vector = min(4, even, max(1, math.prod(shape) // split // LANES)) if i == len(shape) - 1 else 1
            vector = vector & -vector
            across = min(lanes, even // vector)
            lanes //= across
            factors = ((f"more{i}", size // across // vector), (f"lane{i}", across), (f"vector{i}", vector))
            axes.insert(0, (("split", split), *factors) if i == 0 else factors)
            names.insert(0, f"lane{i}")
        copies = WARPS // self.per_block // split
        if not self.units_axis:
            return Registers(tuple(axes), ("split", copies), (lanes, *names))
        return Registers(((("unit", self.per_block),), *axes), ("unit", "split", copies), (lanes, *names))

    @property
    def units_axis(self) -> tuple[int, ...]:
        """The axis of a block's units; one unit has none, because references cannot fold an axis of size 1 away."""
        return (self.per_block,) if self.per_block > 1 else ()

    def token(self, ref: Any, t: int) -> Any:
        """Token (or row of words) t of each unit of a reference."""
        return ref.at[:, t] if self.units_axis else ref.at[t]


def quantize_pack(x: jax.Array, fmt: Format, *, interpret: bool = False) -> Quantized:
    """See `api.quantize_pack`."""
    require_hopper(interpret)
    *lead, num_tokens, dim = x.shape
    plan = _plan(x, fmt, Machine(interpret))
    codes, *metadata = _call(plan, x.reshape(plan.units, plan.tokens, *plan.channels))
    rows = num_tokens if fmt.bits == 8 else num_tokens * fmt.bits // 32
    by_token = fmt.axis == "token"
    shape = (num_tokens, dim // fmt.group_size) if by_token else (num_tokens // fmt.group_size, dim)
    metadata = [m.reshape(*lead, *shape) for m in metadata]
    return Quantized(codes.reshape(*lead, rows, dim), metadata[0], None if fmt.symmetric else metadata[1])


def _plan(x: jax.Array, fmt: Format, machine: Machine) -> _Plan:
    *_, num_tokens, dim = x.shape
    tokens = fmt.group_size if fmt.axis == "channel" else UNIT
    if num_tokens % UNIT or tokens % UNIT:
        raise Unsupported(f"{num_tokens} tokens in groups of {tokens} are not whole units of {UNIT}.")
    units = x.size // (tokens * dim)
    per_block = math.gcd(units, WARPS)
    if fmt.axis == "token":
        if dim % 16 or fmt.group_size % 8 or fmt.group_size > 256:
            raise Unsupported(f"head_dim={dim} in groups of {fmt.group_size} cannot be copied in 16-byte rows.")
        channels = (dim // fmt.group_size, fmt.group_size)
        return _Plan(machine, fmt, units, tokens, channels, per_block, channels[0])
    if dim % 16:
        raise Unsupported(f"head_dim={dim} must be a multiple of 16.")
    width = dim
    while per_block * tokens * width * x.dtype.itemsize > HOPPER_BYTES and width % 64 == 0:
        width //= 2
    return _Plan(machine, fmt, units, tokens, (dim,), per_block, width)


def _call(plan: _Plan, x: jax.Array) -> Any:
    """Run the kernel: codes [units, rows, *channels], and scale and zero point of each unit [units, values]."""
    fmt, by_token = plan.fmt, plan.fmt.axis == "token"
    num_metadata = 1 if fmt.symmetric else 2
    code_dtype = jnp.uint8 if fmt.bits == 8 else jnp.uint32
    values = plan.tokens * plan.channels[0] if by_token else plan.channels[0]
    out = [
        jax.ShapeDtypeStruct((plan.units, plan.code_rows, *plan.channels), code_dtype),
        *[jax.ShapeDtypeStruct((plan.units, values), fmt.metadata_dtype)] * num_metadata,
    ]
    block = (plan.width, *plan.channels[1:])
    scratch = (
        plgpu.SMEM((*plan.units_axis, plan.tokens, *block), x.dtype),
        plgpu.SMEM((*plan.units_axis, plan.code_rows, *block), code_dtype),
        *[plgpu.SMEM((*plan.units_axis, values if by_token else plan.width), fmt.metadata_dtype)] * num_metadata,
        plgpu.Barrier(),
    )
    grid = {"i": plan.units // plan.per_block, "j": plan.channels[0] // plan.width}
    # Shared memory that is written is not read again, so barriers around each store are not needed.
    run = plan.machine.kernel(
        lambda *refs: _kernel(plan, num_metadata, *refs), tuple(out), grid, scratch, unsafe_no_auto_barriers=True
    )
    return run(x)


def _kernel(plan, num_metadata, x_gmem, *refs):
    """Quantise the channels of one block's units."""
    outs, (x_smem, *smems, barrier) = refs[: 1 + num_metadata], refs[1 + num_metadata :]
    block = lax.axis_index("i")
    first = pl.ds(block * plan.per_block, plan.per_block) if plan.units_axis else block
    channels = pl.ds(lax.axis_index("j") * plan.width, plan.width)
    plgpu.copy_gmem_to_smem(x_gmem.at[first, :, channels], x_smem, barrier)
    plgpu.barrier_wait(barrier)
    codes_smem, *metadata_smem = smems
    tokens = (_by_token if plan.fmt.axis == "token" else _by_channel)(plan, x_smem, metadata_smem)
    _pack(plan, tokens, codes_smem)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes_smem, outs[0].at[first, :, channels])
    for smem, gmem in zip(metadata_smem, outs[1:], strict=True):
        plgpu.copy_smem_to_gmem(smem, gmem.at[first] if plan.fmt.axis == "token" else gmem.at[first, channels])
    plgpu.wait_smem_to_gmem(0)


def _by_channel(plan: _Plan, x_smem: Any, metadata_smem: list) -> Iterator[jax.Array]:
    """Codes of each token of the units, u32 like a token of x; fits a group along tokens first."""
    layout = plan.registers.layout()

    def load(t):
        return plan.machine.load(plan.token(x_smem, t), layout).astype(jnp.float32)

    x = _ranged(load(0), plan.fmt)
    low, high = x, x
    for t in range(1, plan.tokens):
        x = _ranged(load(t), plan.fmt)
        low, high = jnp.minimum(low, x), jnp.maximum(high, x)
    stored, scale, zero_point = _fit(low, high, plan.fmt)
    for ref, value in zip(metadata_smem, stored, strict=True):
        ref[...] = value
    inverse = _inverse(plan, scale, layout)
    for t in range(plan.tokens):
        yield _encode(load(t), inverse, zero_point, plan.fmt)


def _by_token(plan: _Plan, x_smem: Any, metadata_smem: list) -> Iterator[jax.Array]:
    """The same for groups along channels, token by token."""
    layout, groups, last = plan.registers.layout(), plan.channels[0], len(plan.units_axis) + 1

    def spread(value, shape):
        return plan.machine.cast(lax.broadcast_in_dim(value, shape, tuple(range(last))), layout)

    for t in range(plan.tokens):
        x = plan.machine.load(plan.token(x_smem, t), layout).astype(jnp.float32)  # [*units_axis, groups, channels]
        ranged = _ranged(x, plan.fmt)
        stored, scale, zero_point = _fit(ranged.min(last), ranged.max(last), plan.fmt)
        for ref, value in zip(metadata_smem, stored, strict=True):
            ref[..., t * groups : (t + 1) * groups] = value
        inverse = _inverse(plan, scale, layout.reduce(last))
        yield _encode(x, spread(inverse, x.shape), spread(zero_point, x.shape), plan.fmt)


def _ranged(x: jax.Array, fmt: Format) -> jax.Array:
    """What the extent of a group is measured on."""
    return jnp.abs(x) if fmt.symmetric else x


def _fit(low: jax.Array, high: jax.Array, fmt: Format) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """What is stored of each group, and scale and zero point as float32; of a symmetric group from magnitudes."""
    if fmt.symmetric:
        half = fmt.num_levels // 2
        stored = _stored(high * (fmt.clip / half), fmt)
        scale = stored.astype(jnp.float32)
        return [stored], scale, lax.optimization_barrier(-scale * float(half))  # not contracted with x - zero_point
    scale, zero_point = _stored((high - low) * (fmt.clip / (fmt.num_levels - 1)), fmt), _stored(low * fmt.clip, fmt)
    return [scale, zero_point], scale.astype(jnp.float32), zero_point.astype(jnp.float32)


def _stored(x: jax.Array, fmt: Format) -> jax.Array:
    largest = float(jnp.finfo(fmt.metadata_dtype).max)
    return jnp.minimum(jnp.maximum(x, -largest), largest).astype(fmt.metadata_dtype)


def _inverse(plan: _Plan, scale: jax.Array, layout: Any) -> jax.Array:
    return jnp.where(scale > 0, plan.machine.reciprocal(jnp.where(scale > 0, scale, 1.0), layout), 0.0)


def _encode(x: jax.Array, inverse: jax.Array, zero_point: jax.Array, fmt: Format) -> jax.Array:
    """Codes as u32: 2**23 + code is a float32 whose low bits are the code, rounded to even."""
    codes = jnp.minimum(jnp.maximum((x - zero_point) * inverse, 0.0), float(fmt.num_levels - 1))
    return lax.bitcast_convert_type(codes + 2.0**23, jnp.uint32) & jnp.uint32(0xFF)


def _pack(plan: _Plan, tokens: Iterator[jax.Array], codes_smem: Any) -> None:
    """Write codes, in the order of `packing`."""
    bits = plan.fmt.bits
    if bits == 8:
        for t, codes in enumerate(tokens):
            plan.token(codes_smem, t)[...] = codes.astype(jnp.uint8)
        return
    planes = {2: ((0, 2),), 3: ((0, 2), (2, 1)), 4: ((0, 4),)}[bits]
    words: dict[int, jax.Array] = {}
    for t, codes in enumerate(tokens):
        row = t // UNIT * bits
        for low, width in planes:
            per_word = 32 // width
            at = row + t % UNIT // per_word
            part = (codes >> jnp.uint32(low)) & jnp.uint32(2**width - 1)
            part = part << jnp.uint32(width * (t % per_word))
            words[at] = words[at] | part if at in words else part
            if t % per_word == per_word - 1:
                plan.token(codes_smem, at)[...] = words.pop(at)
            row += UNIT * width // 32
