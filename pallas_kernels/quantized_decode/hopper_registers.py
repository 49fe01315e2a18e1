"""The steps of Hopper's decode kernel that Pallas cannot express: registers in, registers out, no memory touched.

Each function has a stand-in in plain JAX for the interpreter. Which register holds what is `hopper_codes`' matter.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic_gpu import COLUMNS, ROWS, Machine, Registers
from pallas_kernels.quantized_decode.hopper_codes import PIECE, TILE, UNIT, UNITS, Keys, Order, Values, planes

_WGMMA = plgpu.Layout.WGMMA
_BIAS, _BIASED = 128.0, 0x43004300  # 0x4300 | code is the bfloat16 of 128 + code, for codes below 128


def middle(bits: int) -> float:
    """The code from which others are measured, so that rounding a scale costs little."""
    return float(2 ** (bits - 1))


def keys(
    machine: Machine, words_ref: Any, scales: list[jax.Array], by_channel: bool, form: Keys, piece: int
) -> jax.Array:
    """Decode a piece of a tile of keys [4, rows, 64] into a left operand bf16[128, 64], rows and columns in order.

    Args:
      scales: Scale and zero point of codes less the middle; f32 in the registers of `form.scales` [groups, 64], of
        this piece, or of `form.order.metadata` [4, 32 * D / g], of all.
    """
    if machine.interpret:
        codes = form.decode(words_ref[...]).astype(jnp.float32) - middle(form.bits)
        scale, zero_point = (_beside_codes(x, by_channel, form, piece) for x in scales)
        return (codes * scale + zero_point).astype(jnp.bfloat16)
    first = scales[0].shape
    meta = form.scales(first[0]) if by_channel else form.order.metadata(first[1] // UNIT)
    return _unpack(machine, words_ref, form, (TILE, PIECE), scales, meta, by_channel, piece)


def values(machine: Machine, words_ref: Any, scales: list[jax.Array], form: Values) -> jax.Array:
    """Unpack a piece of a tile of values [4, rows, 64] into a left operand bf16[64, 128], rows and columns in order.

    Args:
      scales: Scale and zero point per channel of codes less the middle, f32 in the registers of `form.scales`
        [groups, 64]; or none, for codes less the middle.
    """
    if machine.interpret:
        codes = form.decode(words_ref[...]).astype(jnp.float32) - middle(form.bits)
        if scales:
            rows = (form.rows(_round(x).T) for x in scales)  # [64, groups]
            scale, zero_point = (form.order.arrange(jnp.repeat(x, TILE // x.shape[1], 1).T).T for x in rows)
            codes = codes * scale + zero_point
        return codes.astype(jnp.bfloat16)
    meta = form.scales(scales[0].shape[0]) if scales else None
    return _unpack(machine, words_ref, form, (PIECE, TILE), scales, meta, True, 0)


def by_row(machine: Machine, x: jax.Array, order: Order) -> list[jax.Array]:
    """Cut [4, 32 * groups], in the registers of `order.metadata`, into a value a row for each group: [128] each."""
    groups = x.shape[1] // UNIT
    if machine.interpret:
        arranged = order.arrange(x.reshape(TILE, groups))
        return [arranged[:, g] for g in range(groups)]
    out = [plgpu.ShapeDtypeStruct((TILE,), x.dtype, ROWS)] * groups

    @plgpu.inline_mgpu(arg_types=(order.metadata(groups).layout(),), return_type=out)
    def cut(_, x):
        regs = x.registers.reshape(2)  # m; each b times groups
        shape = ROWS.to_mgpu().registers_shape((TILE,))
        one = _vector(1, x.mlir_dtype)
        at = [[vector.extract_strided_slice(one, reg, [i], [1], [1]) for i in range(2 * groups)] for reg in regs]
        return [
            _array([at[m][b * groups + g] for m in range(2) for b in range(2)], shape, ROWS, x) for g in range(groups)
        ]

    return cut(x)


def beside(machine: Machine, xs: list[jax.Array]) -> jax.Array:
    """Concatenate accumulators [m, n], or values a column [n], along their columns."""
    if len(xs) == 1:
        return xs[0]
    if machine.interpret:
        return jnp.concatenate(xs, -1)
    layout, axis = (_WGMMA, 1) if xs[0].ndim == 2 else (COLUMNS, 0)
    out = plgpu.ShapeDtypeStruct((*xs[0].shape[:-1], sum(x.shape[-1] for x in xs)), xs[0].dtype, layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(xs), return_type=out)
    def join(_, *xs):
        regs = np.concatenate([x.registers for x in xs], axis)
        return _array(regs, regs.shape, layout, xs[0])

    return join(*xs)


class Word:
    """A 32-bit register, with the operators that `pairs` uses."""

    def __init__(self, value: Any):
        self.value = value

    def __and__(self, other: Any) -> "Word":
        return Word(arith.andi(self.value, _value(other)))

    def __or__(self, other: Any) -> "Word":
        return Word(arith.ori(self.value, _value(other)))

    def __add__(self, other: Any) -> "Word":
        return Word(arith.addi(self.value, _value(other)))

    def __mul__(self, other: Any) -> "Word":
        return Word(arith.muli(self.value, _value(other)))

    def __floordiv__(self, other: Any) -> "Word":
        return Word(arith.divui(self.value, _value(other)))

    def __mod__(self, other: Any) -> "Word":
        return Word(arith.remui(self.value, _value(other)))

    def __rshift__(self, other: Any) -> "Word":
        return Word(arith.shrui(self.value, _value(other)))

    def __lshift__(self, other: Any) -> "Word":
        return Word(arith.shli(self.value, _value(other)))

    def permute(self, other: Any, selector: Any) -> "Word":
        """Four bytes out of the eight of two words; a selector has four bits a byte, the lowest first."""
        args = [self.value, _value(other), _value(selector)]
        return Word(llvm.inline_asm(_i32(), args, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r"))


def _asm(instruction: str, *args: Word) -> Word:
    """An instruction on pairs of bf16; LLVM has them only by way of float32."""
    names = ", ".join(f"${i}" for i in range(len(args) + 1))
    values = [arg.value for arg in args]
    return Word(llvm.inline_asm(_i32(), values, f"{instruction} {names};", ",".join(["=r"] + ["r"] * len(args))))


def _unpack(
    machine: Machine,
    words_ref: Any,
    form: Any,
    shape: tuple,
    scales: list,
    meta: Registers | None,
    by_channel: bool,
    piece: int,
) -> jax.Array:
    """Load planes, then make the operand out of `form.pairs` and the scales."""
    parts = [(form.registers(plane), plane) for plane in planes(form.bits)]
    loaded = [machine.load(words_ref.at[:, start:stop], regs.layout()) for regs, (_, start, stop) in parts]
    layouts = [regs.layout() for regs, _ in parts] + ([meta.layout()] * 2 if scales and meta else [])

    @plgpu.inline_mgpu(arg_types=tuple(layouts), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=_WGMMA))
    def unpack(_, *arrays):
        lane = Word(arith.remui(mgpu.utils.thread_idx(), _value(32)))
        words = [_words(x, regs) for x, (regs, _) in zip(arrays, parts, strict=False)]
        at = _scales(arrays[len(parts) :], meta, form, by_channel, piece)
        registers = np.empty((shape[0] // 64, shape[1] // 8, 2), object)
        for index, i, x, pair in form.pairs(words, lane):
            pair = _centred(pair, form.bits)
            registers[index] = _as_bf16(pair if at is None else _asm("fma.rn.bf16x2", pair, *at(index, i, x)))
        out = _WGMMA.to_mgpu()
        return mgpu.FragmentedArray(
            _registers=registers.reshape(out.registers_shape(shape)), _layout=out, _is_signed=None
        )

    return unpack(*loaded, *scales)


def _scales(arrays: tuple, meta: Registers | None, form: Any, by_channel: bool, piece: int) -> Any:
    """Function of what `form.pairs` yields that gives the scales and zero points of its two codes; None without."""
    if not arrays or meta is None:
        return None
    found = [x.registers.reshape(meta.held_shape) for x in arrays]
    if isinstance(form, Values):  # two tokens of one channel and group
        per_group = UNITS // meta.sizes["group"]
        return lambda index, unit, x: [_pair(regs[unit // per_group], x, x) for regs in found]
    if by_channel:  # two channels
        return lambda index, j, x: [_pair(regs[j], x, x + 1) for regs in found]
    groups = meta.factors[-1][1] // 2  # two channels of one token and group

    def of_token(index, j, x):
        m, _, b = index
        at = b * groups + (piece * PIECE + j * 4 * form.vector) // form.part
        return [_pair(regs[m], at, at) for regs in found]

    return of_token


def _words(x: Any, regs: Registers) -> np.ndarray:
    """The registers of an array as words, [*held_shape, words of a vector]; short vectors are filled with zeros."""
    length = regs.factors[-1][1]
    held = x.registers.reshape(regs.held_shape)
    size = max(1, length * mgpu.utils.bitwidth(x.mlir_dtype) // 32)
    out = np.empty((*held.shape, size), object)
    for index, reg in np.ndenumerate(held):
        if length * mgpu.utils.bitwidth(x.mlir_dtype) < 32:
            narrow = vector.bitcast(_vector(1, ir.IntegerType.get_signless(16)), reg)
            out[*index, 0] = Word(arith.extui(_i32(), _element(narrow, 0)))
            continue
        whole = vector.bitcast(_vector(size, _i32()), reg)
        for i in range(size):
            out[*index, i] = Word(_element(whole, i))
    return out


def _centred(pair: Word, bits: int) -> Word:
    """Two codes in halves less the middle, as bf16. For bytes, 0x4b000000 | code is the float32 of 2**23 + code."""
    if bits < 8:
        return _asm("sub.rn.bf16x2", pair | _BIASED, _twice(_BIAS + middle(bits)))
    magic, f32 = Word(_value(0x4B000000)), ir.F32Type.get()
    halves = [arith.bitcast(f32, pair.permute(magic, selector).value) for selector in (0x7440, 0x7442)]
    start = arith.constant(f32, ir.FloatAttr.get(f32, 2.0**23 + middle(bits)))
    return _rounded(*(arith.subf(half, start) for half in halves))


def _round(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def _beside_codes(x: jax.Array, by_channel: bool, form: Keys, piece: int) -> jax.Array:
    """What one scale covers: [groups, 64] or [4, 32 * groups] -> f32[128, 64] in the order of rows and columns."""
    if by_channel:
        x = jnp.repeat(_round(x), TILE // x.shape[0], 0)
    else:
        x = jnp.repeat(_round(x).reshape(TILE, -1), form.part, 1)[:, piece * PIECE : (piece + 1) * PIECE]
    return form.columns(form.order.arrange(x))


def _array(registers: Any, shape: tuple[int, ...], layout: Any, like: Any) -> Any:
    regs = np.empty(math.prod(shape), object)
    regs[:] = list(np.asarray(registers, object).flat)
    return mgpu.FragmentedArray(_registers=regs.reshape(shape), _layout=layout.to_mgpu(), _is_signed=like.is_signed)


def _pair(x: Any, first: int, second: int) -> Word:
    """Two elements of a float32 vector as bf16."""
    return _rounded(_element(x, first), _element(x, second))


def _rounded(first: Any, second: Any) -> Word:
    both = vector.from_elements(_vector(2, ir.F32Type.get()), [first, second])
    return Word(_element(vector.bitcast(_vector(1, _i32()), arith.truncf(_vector(2, ir.BF16Type.get()), both)), 0))


def _twice(value: float) -> Word:
    """A bf16 constant in both halves."""
    half = int(np.asarray(value, jnp.bfloat16).view(np.uint16))
    return Word(_value(half * 0x10001))


def _as_bf16(x: Word) -> Any:
    return vector.bitcast(_vector(2, ir.BF16Type.get()), vector.broadcast(_vector(1, _i32()), x.value))


def _element(x: Any, i: int) -> Any:
    return vector.extract(x, [], [i])


def _value(x: Any) -> Any:
    if isinstance(x, Word):
        return x.value
    return (
        arith.constant(_i32(), ir.IntegerAttr.get(_i32(), x - 2**32 if x >= 2**31 else x)) if isinstance(x, int) else x
    )


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _vector(length: int, dtype: Any) -> Any:
    return ir.VectorType.get((length,), dtype)
