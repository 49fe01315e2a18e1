"""Hopper's registers: every thread of a warpgroup is simulated, since interpreters know no register layouts."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import LANES, WARPS
from pallas_kernels.packing import pack
from pallas_kernels.quantized_decode.hopper_codes import PIECE, TILE, UNITS, Keys, Order, Values, order_for, planes

BITS = (2, 3, 4, 8)
PAIRS = [(k, v) for k, v in itertools.product(BITS, repeat=2) if order_for(k, v)]


class Word:
    """A 32-bit register."""

    def __init__(self, value):
        self.value = int(value) & 0xFFFFFFFF

    def __rshift__(self, other):
        return Word(self.value >> int(other))

    def __lshift__(self, other):
        return Word(self.value << int(other))

    def __and__(self, other):
        return Word(self.value & other)

    def __or__(self, other):
        return Word(self.value | other.value)

    def permute(self, other, selector):
        pool = self.value.to_bytes(4, "little") + other.value.to_bytes(4, "little")
        return Word(int.from_bytes(bytes(pool[int(selector) >> 4 * i & 7] for i in range(4)), "little"))


def element(registers, warp, lane, held):
    """Index of the first element of a thread's register."""
    digits = dict(zip(registers.held, held, strict=True))
    for names, value in ((registers.warp, warp), (registers.lane, lane)):
        for name in reversed(names):
            size = name if isinstance(name, int) else registers.sizes[name]
            digits[name] = value % size
            value //= size
    index = []
    for axis in registers.axes:
        at = 0
        for name, size in axis:
            at = at * size + digits.get(name, 0)
        index.append(at)
    return tuple(index)


def load(registers, x, warp, lane):
    """A thread's registers of x as words, [*held_shape, words of a vector]."""
    rows = []
    for held in np.ndindex(*registers.held_shape):
        *lead, first = element(registers, warp, lane, held)
        vector = x[tuple(lead)][first : first + registers.factors[-1][1]]
        rows.append([Word(word) for word in np.frombuffer(vector.tobytes().ljust(4, b"\0"), np.uint32)])
    out = np.empty((len(rows), len(rows[0])), object)
    out[:] = rows
    return out.reshape(*registers.held_shape, -1)


def forms(k_bits, v_bits):
    order = order_for(k_bits, v_bits)
    return [(Keys(k_bits, order, part), k_bits) for part in (PIECE, 32, 16)] + [(Values(v_bits, order), v_bits)]


@pytest.mark.parametrize(("k_bits", "v_bits"), PAIRS)
def test_every_code_reaches_its_place_in_the_operand(k_bits, v_bits):
    rng = np.random.default_rng(0)
    for form, bits in forms(k_bits, v_bits):
        codes = rng.integers(0, 2**bits, (TILE, PIECE)).astype(np.uint8)
        words = np.asarray(pack(jnp.asarray(codes), bits)).reshape(UNITS, -1, PIECE)
        want = np.asarray(form.decode(jnp.asarray(words)))
        got = np.full(want.shape, -1)
        for warp, lane in np.ndindex(WARPS, LANES):
            loaded = [load(form.registers(p), words[:, p[1] : p[2]], warp, lane) for p in planes(bits)]
            for (m, block, b), *_, pair in form.pairs(loaded, np.int64(lane)):
                # Thread (warp, r, c) of a left operand of wgmma holds this row and two adjacent columns.
                row, column = 64 * m + 16 * warp + 8 * b + lane // 4, 8 * block + 2 * (lane % 4)
                garbage = 0xFF if bits == 8 else 0xFFFF
                got[row, column : column + 2] = [pair.value & garbage, pair.value >> 16 & garbage]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("k_bits", "v_bits"), PAIRS)
def test_layouts_are_what_the_compiler_is_told(k_bits, v_bits):
    for form, bits in forms(k_bits, v_bits):
        found = [form.registers(plane) for plane in planes(bits)] + [form.scales(groups) for groups in (1, 2, 4)]
        for registers in [*found, *(form.order.metadata(groups) for groups in (1, 2, 4))]:
            assert_same_layout(registers)


def assert_same_layout(registers):
    layout = registers.layout().to_mgpu()
    held = layout.registers_shape(registers.shape)
    tiled = layout.tiled_tiling_shape
    for warp, lane in np.ndindex(WARPS, LANES):
        digits = {**selected(warp, layout.warp_dims, tiled), **selected(lane, layout.lane_dims, tiled)}
        for index, ours in zip(np.ndindex(*held), np.ndindex(*registers.held_shape), strict=True):
            index = list(index)
            for dim, value in digits.items():
                index[dim] = value
            assert layout.tiling.untile_indices(tuple(index)) == element(registers, warp, lane, ours)


def selected(value, dims, tiled):
    """Tiled indices that a warp or lane selects."""
    out = {}
    for dim in reversed(dims):
        size = dim.times if isinstance(dim, plgpu.Replicated) else tiled[dim]
        if not isinstance(dim, plgpu.Replicated):
            out[dim] = value % size
        value //= size
    return out


@pytest.mark.parametrize("n", [2, 4, 8])
def test_an_order_of_tokens_is_one(n):
    order, values = Order(n), Values(4, Order(n))
    np.testing.assert_array_equal(order.arrange(jnp.arange(TILE)), order.token(np.arange(TILE)))
    np.testing.assert_array_equal(values.rows(jnp.arange(PIECE)), values.channel(np.arange(PIECE)))
    np.testing.assert_array_equal(values.channels_of(values.rows(jnp.arange(PIECE))), np.arange(PIECE))
