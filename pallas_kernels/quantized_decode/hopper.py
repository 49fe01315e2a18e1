"""Decode attention over packed rows in Pallas Mosaic GPU, Hopper and newer: split over slots, merged in plain JAX.

A block of one warpgroup attends from 8 query rows of a KV head to a range of slots, in tiles of 128 that the copy
engine brings. Both products take the cache as their left operand, from registers, and the queries fill the short
side: logits [128, 8] = keys [128, D] x q, then acc [D, 8 G] += values [D, 128] x probs, each 64 channels at a time.

Scales of values per token fold into probs, once for each of the G groups in 64 channels, and codes enter as they are;
a channel keeps its own group's 8 columns at the end. Keys, and values with scales per channel, are scaled in registers
before they are rounded to bfloat16: folding their scales into q would take a q for every group of a tile.

More than 8 query rows read the cache once for every 8, mostly from L2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.mosaic_gpu import COLUMNS, LOG2E, ROWS, Machine, along, operand, require_hopper, tanh
from pallas_kernels.prefill.reference import MASK_VALUE
from pallas_kernels.quantized_decode import hopper_registers as registers
from pallas_kernels.quantized_decode.block_sizes import HOPPER_STAGES, hopper_splits
from pallas_kernels.quantized_decode.hopper_codes import PIECE, TILE, UNIT, UNITS, Keys, Values, order_for

_COLUMNS = 8  # query rows of a block, the matrix unit's shortest side


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the kernel must know of a call."""

    machine: Machine
    k_format: Format
    v_format: Format
    keys: Keys
    values: Values
    row_blocks: int  # blocks of query rows a KV head
    pos_heads: int  # heads that positions have; 0 without positions
    soft_cap: float | None
    sliding_window: int | None
    splits: int
    tiles: int  # of a split
    pieces: int  # of a head

    @property
    def v_part(self) -> int:
        """Channels that share a scale of a value, or all."""
        return self.v_format.group_size if self.v_format.axis == "token" else self.pieces * PIECE

    @property
    def v_groups(self) -> int:
        """Scales of a value, each with its own columns of probs."""
        return self.pieces * PIECE // self.v_part

    def columns(self, piece: int) -> slice:
        """Columns of probs that serve a piece of values."""
        first = piece * PIECE // self.v_part
        return slice(first * _COLUMNS, (first + max(1, PIECE // self.v_part)) * _COLUMNS)


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.quantized_decode`."""
    require_hopper(interpret)
    batch, heads, rows, dim = q.shape
    slots = k.codes.shape[2] if k_format.bits == 8 else k.codes.shape[2] * 32 // k_format.bits
    order = _check(rows, dim, slots, k_format, v_format)
    row_blocks, tiles = -(-rows // _COLUMNS), -(-slots // TILE)
    per_split = -(-tiles // hopper_splits(batch * heads * row_blocks, tiles))
    part = k_format.group_size if k_format.axis == "token" else dim
    plan = _Plan(
        Machine(interpret), k_format, v_format, Keys(k_format.bits, order, part),
        Values(v_format.bits, order), row_blocks, 0 if pos is None else pos.shape[1], soft_cap, sliding_window,
        -(-tiles // per_split), per_split, dim // PIECE,
    )  # fmt: skip
    q = plan.keys.columns(_blocks_of_rows(q, row_blocks, 2)).reshape(batch, heads * row_blocks, _COLUMNS, dim)
    still = [q.astype(jnp.bfloat16), length]
    if pos is not None:
        still.append(_blocks_of_rows(q_pos, row_blocks, 1))
    acc, top, total = _call(plan, still, _streams(plan, k, v, pos))
    lead = (batch, heads, row_blocks, plan.splits)
    acc, top, total = _merge(*(x.reshape(*lead, *x.shape[3:]) for x in (acc, top, total)))
    acc = plan.values.channels_of(jnp.swapaxes(acc, -1, -2))
    acc = acc.reshape(batch, heads, row_blocks * _COLUMNS, dim)[:, :, :rows]
    top, total = (x.reshape(batch, heads, -1)[:, :, :rows] for x in (top, total))
    return acc, top, total


def _check(rows: int, dim: int, slots: int, k_format: Format, v_format: Format):
    if dim % PIECE or dim > 256:
        raise Unsupported(f"head_dim={dim} must be 64, 128, 192 or 256.")
    if rows > 64:
        raise Unsupported(f"{rows} query rows a KV head read the cache too often; 64 is the limit.")
    if slots % UNIT:
        raise Unsupported(f"{slots} slots are not whole units of {UNIT}.")
    for fmt in (k_format, v_format):
        if fmt.axis == "channel" and fmt.group_size not in (32, 64, 128):
            raise Unsupported(f"group_size={fmt.group_size} per channel must be 32, 64 or 128 tokens.")
        if fmt.axis == "token" and not (fmt.group_size in (16, 32, 64) or fmt.group_size % PIECE == 0):
            raise Unsupported(f"group_size={fmt.group_size} per token must be 16, 32 or a multiple of {PIECE}.")
    order = order_for(k_format.bits, v_format.bits)
    if order is None:
        raise Unsupported(
            f"keys of {k_format.bits} bits with values of {v_format.bits} do not share an order of tokens."
        )
    return order


def _blocks_of_rows(x: jax.Array, blocks: int, axis: int) -> jax.Array:
    """Pad query rows and cut them into blocks: [..., R, ...] -> [..., blocks, 8, ...]."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, blocks * _COLUMNS - x.shape[axis])
    return jnp.pad(x, pad).reshape(*x.shape[:axis], blocks, _COLUMNS, *x.shape[axis + 1 :])


def _streams(plan: _Plan, k: Quantized, v: Quantized, pos: jax.Array | None) -> dict[str, jax.Array]:
    """What is read tile by tile, cut into units of 32 tokens or groups: [B, K, units, ...]."""
    streams = {}
    for name, enc, fmt in (("k", k, plan.k_format), ("v", v, plan.v_format)):
        batch, heads, _, dim = enc.codes.shape
        streams[name] = enc.codes.reshape(batch, heads, -1, UNIT if fmt.bits == 8 else fmt.bits, dim)
        for kind, x in (("scale", enc.scale), ("zero", enc.zero_point)):
            if x is not None:
                by_unit = (batch, heads, -1, UNIT * dim // fmt.group_size)
                if _one_group(fmt):  # a row a piece: Mosaic loads no part of a single row
                    x = x.reshape(batch, heads, -1, PIECE)
                streams[f"{name}_{kind}"] = x if fmt.axis == "channel" else x.reshape(by_unit)
    if pos is not None:
        streams["pos"] = pos.reshape(*pos.shape[:2], -1, UNIT)
    return streams


def _call(plan: _Plan, still: list[jax.Array], streams: dict[str, jax.Array]) -> Any:
    """Run the kernel: acc f32[B, K * blocks, splits, D, 8], max and sum f32[B, K * blocks, splits, 8]."""
    batch, heads, _, dim = still[0].shape
    grid = {"b": batch, "h": heads, "s": plan.splits}
    lead, f32 = tuple(grid.values()), jnp.float32
    state = (
        jax.ShapeDtypeStruct((*lead, dim, _COLUMNS), f32),
        jax.ShapeDtypeStruct((*lead, _COLUMNS), f32),
        jax.ShapeDtypeStruct((*lead, _COLUMNS), f32),
    )
    scratch = (
        operand((_COLUMNS, dim), jnp.bfloat16),
        operand((_COLUMNS * plan.v_groups, TILE), jnp.bfloat16),
        plgpu.Barrier(),
    )

    def body(*refs):
        inputs, rest = refs[: len(still)], refs[len(still) :]
        _kernel(plan, inputs, dict(zip(streams, rest, strict=False)), *rest[len(streams) :])

    return plan.machine.kernel(body, state, grid, scratch, approx_math=True)(*still, *streams.values())


def _kernel(plan, still, streams, acc_gmem, top_gmem, sum_gmem, q_smem, p_smem, barrier):
    """Attend from 8 query rows to the tiles of one split."""
    machine = plan.machine
    b, h, s = (lax.axis_index(name) for name in "bhs")
    q_gmem, length_gmem = still[:2]
    plgpu.copy_gmem_to_smem(q_gmem.at[b, h], q_smem, barrier)
    plgpu.barrier_wait(barrier)
    length, first = length_gmem[b], s * plan.tiles
    q_pos = machine.load(still[2].at[b, h % plan.row_blocks], COLUMNS) if plan.pos_heads else None
    token = plan.keys.order.token(machine.iota((TILE,), 0, ROWS))

    def step(index, *refs_and_state):
        *refs, (accs, shift, top, total) = refs_and_state
        tile = dict(zip(streams, refs, strict=True))
        logits = _logits(plan, tile, q_smem)
        live = _live(plan, tile, (first + index[0]) * TILE + token, length, q_pos)
        logits = jnp.where(live, logits * LOG2E, MASK_VALUE)
        new_top = jnp.maximum(top, logits.max(0))
        keep = jnp.exp2(top - new_top)
        probs = jnp.where(live, jnp.exp2(logits - along(new_top, logits, 1)), 0.0)
        total = total * along(keep, total, 1) + probs
        weights, extra = _weights(plan, tile, probs)
        machine.store_transposed(weights, p_smem)
        shift = _times(plan, shift, keep) + extra
        accs = [_add_values(plan, tile, i, _times(plan, acc, keep), p_smem) for i, acc in enumerate(accs)]
        return accs, shift, new_top, total

    wide = plan.columns(0).stop
    start = (
        [machine.full((PIECE, wide), 0.0)] * plan.pieces,
        machine.full((PIECE, _COLUMNS * plan.v_groups), 0.0),
        machine.full((_COLUMNS,), MASK_VALUE, COLUMNS),
        machine.full((TILE, _COLUMNS), 0.0),
    )
    steps = jnp.clip((length + TILE - 1) // TILE - first, 0, plan.tiles)
    pipeline = plgpu.emit_pipeline(
        step,
        grid=(steps,),
        in_specs=[_spec(plan, name, ref, b, h, first) for name, ref in streams.items()],
        max_concurrent_steps=HOPPER_STAGES,
        init_carry=start,
    )
    accs, shift, top, total = pipeline(*streams.values())
    shift = shift.sum(0)
    for i, acc in enumerate(accs):
        acc = acc + along(shift[plan.columns(i)], acc, 1)
        acc_gmem[b, h, s, i * PIECE : (i + 1) * PIECE] = _own_columns(plan, acc)
    top_gmem[b, h, s] = top * (1 / LOG2E)
    sum_gmem[b, h, s] = total.sum(0)


def _spec(plan: _Plan, name: str, ref: Any, b: Any, h: Any, first: Any) -> pl.BlockSpec:
    """Walk a stream's units, a tile at a step."""
    fmt = plan.k_format if name[0] == "k" else plan.v_format
    per_tile = TILE // fmt.group_size if "_" in name and fmt.axis == "channel" else UNITS
    if "_" in name and _one_group(fmt):
        per_tile = plan.pieces
    head = h // plan.row_blocks if name != "pos" or plan.pos_heads > 1 else 0
    rest = ref.shape[3:]
    return pl.BlockSpec((None, None, per_tile, *rest), lambda i: (b, head, first + i, *(0 for _ in rest)))


def _logits(plan: _Plan, tile: dict[str, Any], q_smem: Any) -> jax.Array:
    """Logits of a tile, f32[128, 8]."""
    machine, by_channel = plan.machine, plan.k_format.axis == "channel"
    logits = machine.full((TILE, _COLUMNS), 0.0)
    for i in range(plan.pieces):
        scales = _scales(plan, tile, "k", i)
        keys = registers.keys(machine, _piece(tile["k"], i), scales, by_channel, plan.keys, i)
        logits = machine.dot(logits, keys, _piece(q_smem, i))
    return logits if plan.soft_cap is None else plan.soft_cap * tanh(logits * (1 / plan.soft_cap))


def _add_values(plan: _Plan, tile: dict[str, Any], i: int, acc: jax.Array, p_smem: Any) -> jax.Array:
    """acc [64, n] plus a piece of values times probs."""
    scales = _scales(plan, tile, "v", i) if plan.v_format.axis == "channel" else []
    values = registers.values(plan.machine, _piece(tile["v"], i), scales, plan.values)
    return plan.machine.dot(acc, values, p_smem.at[plan.columns(i)])


def _piece(ref: Any, i: int) -> Any:
    """Channels of a piece, along the last axis."""
    return ref.at[..., i * PIECE : (i + 1) * PIECE]


def _one_group(fmt: Format) -> bool:
    """Whether a tile has one scale a channel."""
    return fmt.axis == "channel" and fmt.group_size == TILE


def _scales(plan: _Plan, tile: dict[str, Any], name: str, i: int = 0) -> list[jax.Array]:
    """Scale and zero point of codes less the middle, f32, in the registers of the codes that they belong to."""
    fmt, form = (plan.k_format, plan.keys) if name == "k" else (plan.v_format, plan.values)
    scale_ref, zero_ref = tile[f"{name}_scale"], tile.get(f"{name}_zero")

    def load(ref):
        if fmt.axis == "channel":
            part = ref.at[i : i + 1] if _one_group(fmt) else _piece(ref, i)
            x = plan.machine.load(part, form.scales(part.shape[0]).layout())
        else:
            x = plan.machine.load(ref, form.order.metadata(ref.shape[1] // UNIT).layout())
        return x.astype(jnp.float32)

    scale, middle = load(scale_ref), registers.middle(fmt.bits)
    if zero_ref is None:
        return [scale, scale * (middle - fmt.num_levels // 2)]
    return [scale, load(zero_ref) + scale * middle]


def _weights(plan: _Plan, tile: dict[str, Any], probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probs with the scales of values, bf16[128, 8 G], and what zero points then add to acc, f32[64, 8 G]: summed."""
    machine = plan.machine
    if plan.v_format.axis == "channel":
        return probs.astype(jnp.bfloat16), machine.full((PIECE, _COLUMNS), 0.0)
    scales, zeros = (registers.by_row(machine, x, plan.keys.order) for x in _scales(plan, tile, "v"))
    weights = [(probs * along(scale, probs, 0)).astype(jnp.bfloat16) for scale in scales]
    extras = [probs * along(zero_point, probs, 0) for zero_point in zeros]
    extras = [extra[:PIECE] + extra[PIECE:] for extra in extras]
    return registers.beside(machine, weights), registers.beside(machine, extras)


def _live(plan: _Plan, tile: dict[str, Any], slot: jax.Array, length: Any, q_pos: jax.Array | None) -> jax.Array:
    """Which slots of a tile each query sees, bool[128, 8]."""
    shape = (TILE, _COLUMNS)
    live = lax.broadcast_in_dim(slot, shape, (0,)) < length
    if q_pos is None:
        return live
    order = plan.keys.order
    (here,) = registers.by_row(plan.machine, plan.machine.load(tile["pos"], order.metadata(1).layout()), order)
    here, at = lax.broadcast_in_dim(here, shape, (0,)), lax.broadcast_in_dim(q_pos, shape, (1,))
    live = live & (here >= 0) & (here <= at)
    return live if plan.sliding_window is None else live & (here > at - plan.sliding_window)


def _own_columns(plan: _Plan, acc: jax.Array) -> jax.Array:
    """Keep of acc [64, n], for each channel, the columns of its own group: [64, 8]."""
    group = plan.values.channel(plan.machine.iota((PIECE, _COLUMNS), 0)) // plan.v_part
    own = acc[:, :_COLUMNS]
    for g in range(1, acc.shape[1] // _COLUMNS):
        own = jnp.where(group == g, acc[:, g * _COLUMNS : (g + 1) * _COLUMNS], own)
    return own


def _times(plan: _Plan, acc: jax.Array, keep: jax.Array) -> jax.Array:
    """Scale every 8 columns of acc alike."""
    return acc * along(registers.beside(plan.machine, [keep] * (acc.shape[1] // _COLUMNS)), acc, 1)


def _merge(acc: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add up the states of splits, the fourth axis; acc [..., splits, D, 8], max and sum [..., splits, 8]."""
    most = top.max(3)
    weight = jnp.exp(top - most[:, :, :, None])
    return (acc * weight[..., None, :]).sum(3), most, (total * weight).sum(3)
