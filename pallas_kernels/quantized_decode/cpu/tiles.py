"""The inner products of decode attention on CPU, written in LLVM's portable vectors.

Codes enter products as 16-bit integers, two to a 32-bit lane, with queries or probabilities rounded to 16 bits: a
multiply-add of pairs is one instruction on x86 (`vpdpwssd`, `vpmaddwd`), and half the work of float32. A packed word
unpacks to such pairs by a shift and a mask alone. LLVM splits the 16 lanes where registers are shorter.

A unit is 16 tokens (32 at 3 bits), unpacked as pairs of tokens: one in the low half of a lane, one in the high half.
Addresses are integers; the tiles are called from Numba.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # channels of a vector
_I8, _I16, _I32, _WORD = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_PAIRS = {
    2: [(i, i + 8) for i in range(8)],
    3: [(i, i + 16) for i in range(16)],
    4: [(8 * row + i, 8 * row + i + 4) for row in range(2) for i in range(4)],
    8: [(t, t + 1) for t in range(0, 16, 2)],
}
# Which lanes of two vectors are added: neighbours within four lanes, or blocks of four lanes.
_WITHIN = [
    [source + four + i for four in range(0, 16, 4) for source in (0, 16) for i in part] for part in ((0, 1), (2, 3))
]
_ACROSS = [
    [source + 4 * four + i for source in (0, 16) for four in part for i in range(4)] for part in ((0, 2), (1, 3))
]


def unit(bits: int) -> int:
    """Tokens that the tiles read at a time."""
    return 2 * len(_PAIRS[bits])


def unit_bytes(bits: int, head_dim: int) -> int:
    """Bytes of a unit."""
    return unit(bits) * bits * head_dim // 8


def key_tile(bits: int, rows: int, head_dim: int) -> Callable:
    """Make `tile(codes, q, out, stride, vectors)`: products of queries with the keys of a unit.

    codes: the unit's first row, at the first channel of the sum. q: what `store_queries` wrote, at that channel; rows
    lie `4 * head_dim` bytes apart. out: f32[rows, unit], rows `stride` bytes apart. vectors: how many times 16
    channels are summed.
    """

    def codegen(context, builder, signature, args):
        codes, q, out, stride, vectors = args
        for first in range(0, len(_PAIRS[bits]), 8):
            halves = [
                _key_sums(builder, bits, rows, head_dim, range(at, at + 4), codes, q, vectors)
                for at in (first, first + 4)
            ]
            tokens = [t for pair in _PAIRS[bits][first : first + 8] for t in pair]
            order = sorted(range(16), key=tokens.__getitem__)  # two runs of 8 consecutive tokens
            for r in range(rows):
                sums = builder.sitofp(_fold(builder, halves[0][r], halves[1][r], _ACROSS), _vector(_F32, 16))
                row = builder.add(out, builder.mul(stride, _WORD(r)))
                for run in (order[:8], order[8:]):
                    _store(builder, _shuffle(builder, sums, sums, run), row, 4 * tokens[run[0]])
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, codes, q, out, stride, vectors):
        return types.void(*(types.intp,) * 5), codegen

    return tile


def value_tile(bits: int, rows: int, head_dim: int) -> Callable:
    """Make `tile(codes, p, out, p_stride, units)`: sums over tokens of probabilities times 16 channels of values.

    codes: the first unit's first row, at the first channel. p: what `store_probabilities` wrote for the first unit,
    rows `p_stride` bytes apart. out: f32[rows, 16], rows `4 * head_dim` bytes apart. units: how many are summed.
    """

    def codegen(context, builder, signature, args):
        codes, p, out, p_stride, units = args
        sums = [[_zeros(builder) for _ in range(2)] for _ in range(rows)]  # two chains hide the latency
        with cgutils.for_range(builder, units) as loop:
            here = builder.add(codes, builder.mul(loop.index, _WORD(unit_bytes(bits, head_dim))))
            weights = builder.add(p, builder.mul(loop.index, _WORD(2 * unit(bits))))
            weights = [builder.add(weights, builder.mul(p_stride, _WORD(r))) for r in range(rows)]
            for i, codes16 in enumerate(_unpack(builder, bits, head_dim, here, range(len(_PAIRS[bits])))):
                for r in range(rows):
                    pair = _load(builder, _I32, weights[r], 4 * i)
                    _multiply_add(builder, sums[r][i % 2], codes16, _splat(builder, pair, 16))
        for r in range(rows):
            total = builder.add(*(builder.load(part) for part in sums[r]))
            _store(builder, builder.sitofp(total, _vector(_F32, 16)), out, 4 * head_dim * r)
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, codes, p, out, p_stride, units):
        return types.void(*(types.intp,) * 5), codegen

    return tile


@intrinsic
def store_queries(typingctx, source, target):
    """Store 16 whole floats as `key_tile` reads them: 16 bits, each pair of channels twice."""

    def codegen(context, builder, signature, args):
        source, target = args
        whole = _narrow(builder, source)
        twice = [c for pair in range(0, 16, 2) for c in (pair, pair + 1) * 2]
        _store(builder, _shuffle(builder, whole, whole, twice), target)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


def store_probabilities(bits: int) -> Callable:
    """Make `f(source, target)`: store a unit of whole floats as `value_tile` reads them: 16 bits, in order of pairs."""

    def codegen(context, builder, signature, args):
        source, target = args
        parts = [_narrow(builder, builder.add(source, _WORD(4 * t))) for t in range(0, unit(bits), 16)]
        order = [t for pair in _PAIRS[bits] for t in pair]
        _store(builder, _shuffle(builder, parts[0], parts[-1], order), target)
        return context.get_dummy_value()

    @intrinsic
    def storing(typingctx, source, target):
        return types.void(types.intp, types.intp), codegen

    return storing


@intrinsic
def nearest(typingctx, x):
    """Round a float32 to the nearest whole number."""

    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_F32, [_F32]), "llvm.nearbyint.f32")
        return builder.call(function, args)

    return types.float32(types.float32), codegen


@intrinsic
def larger(typingctx, x, y):
    """The larger of two float32, in a form whose chains LLVM vectorises: of numbers only."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_F32, [_F32, _F32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.maxnum.f32")
        return builder.call(function, args, fastmath=("fast",))

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def copy_bytes(typingctx, source, target, count):
    """Copy memory."""

    def codegen(context, builder, signature, args):
        source, target = (builder.inttoptr(x, _I8.as_pointer()) for x in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


def widen(dtype: str) -> Callable:
    """Make a function to float32 from a float32, or the 16 bits of a "float16" or "bfloat16"."""

    def codegen(context, builder, signature, args):
        if dtype == "float16":
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)
        if dtype == "bfloat16":
            return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), _F32)
        return args[0]

    @intrinsic
    def widening(typingctx, bits):
        return types.float32(types.float32 if dtype == "float32" else types.uint16), codegen

    return widening


def _key_sums(
    builder: ir.IRBuilder,
    bits: int,
    rows: int,
    head_dim: int,
    wanted: Sequence[int],
    codes: ir.Value,
    q: ir.Value,
    vectors: ir.Value,
) -> list[ir.Value]:
    """For each row, sums of four pairs of tokens over channels: i32[16], two lanes of parts for each of 8 tokens.

    The lanes are [pairs 0 and 1, pairs 0 and 1, pairs 2 and 3, pairs 2 and 3], first and second token alternating.
    """
    sums = [[_zeros(builder) for _ in wanted] for _ in range(rows)]
    with cgutils.for_range(builder, vectors) as loop:
        here = builder.add(codes, builder.mul(loop.index, _WORD(_row_bytes(bits, LANES))))
        queries = builder.add(q, builder.mul(loop.index, _WORD(4 * LANES)))
        q16 = [_load(builder, _vector(_I16, 32), queries, 4 * head_dim * r) for r in range(rows)]
        for i, codes16 in enumerate(_unpack(builder, bits, head_dim, here, wanted, by_channel=True)):
            for r in range(rows):
                _multiply_add(builder, sums[r][i], codes16, q16[r])
    folded = []
    for row in sums:
        a, b, c, d = (builder.load(x) for x in row)
        folded.append(_fold(builder, _fold(builder, a, b, _WITHIN), _fold(builder, c, d, _WITHIN), _ACROSS))
    return folded


def _unpack(
    builder: ir.IRBuilder, bits: int, head_dim: int, codes: ir.Value, wanted: Sequence[int], by_channel: bool = False
) -> list[ir.Value]:
    """Codes of some pairs of a unit, 16 channels from address `codes` on: i16[32] each.

    A lane holds both tokens of a channel; by channel, the first token of two channels in an even lane and their second
    token in the next, as sums over channels want them.
    """
    if bits == 8:
        kind, step = _vector(_I8, LANES), 2 if by_channel else 1
        order = [source + at + c for at in range(0, LANES, step) for source in (0, LANES) for c in range(step)]
        rows = [[_load(builder, kind, codes, head_dim * token) for token in _PAIRS[8][i]] for i in wanted]
        return [builder.zext(_shuffle(builder, *row, order), _vector(_I16, 32)) for row in rows]
    words = _words(builder, bits, head_dim, codes)
    if by_channel:
        order = [c + i for c in range(0, 32, 4) for i in (0, 2, 1, 3)]
        words = [_shuffle_halves(builder, w, w, order) for w in words]
    return [builder.bitcast(_field(builder, bits, words, i), _vector(_I16, 32)) for i in wanted]


def _words(builder: ir.IRBuilder, bits: int, head_dim: int, codes: ir.Value) -> list[ir.Value]:
    """Words of a unit in whose halves the tokens of a pair lie at equal shifts."""
    count = unit(bits) * bits // 32
    words = [_load(builder, _vector(_I32, LANES), codes, 4 * head_dim * i) for i in range(count)]
    if bits != 3:
        return words
    a, b, high = words  # low bits of 16 tokens, of 16 more, and the third bits of all 32
    low = [[half + c + source for c in range(0, 32, 2) for source in (0, 32)] for half in (0, 1)]
    return [*(_shuffle_halves(builder, a, b, order) for order in low), high]


def _field(builder: ir.IRBuilder, bits: int, words: list[ir.Value], i: int) -> ir.Value:
    """Codes of pair i out of `_words`, i32[16]."""

    def cut(word: ir.Value, shift: int, width: int) -> ir.Value:
        moved = builder.lshr(word, _constant(shift)) if shift else word
        return builder.and_(moved, _constant((2**width - 1) * 0x10001))

    if bits == 3:
        return builder.or_(cut(words[i // 8], 2 * (i % 8), 2), builder.shl(cut(words[2], i, 1), _constant(2)))
    per_word = 16 // bits
    return cut(words[i // per_word], bits * (i % per_word), bits)


def _multiply_add(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> None:
    """Add to the i32[16] at `total` the products of two i16[32], neighbours summed."""
    a, b = (builder.sext(builder.bitcast(x, _vector(_I16, 32)), _vector(_I32, 32)) for x in (a, b))
    product = builder.mul(a, b, flags=["nsw"])
    even, odd = (_shuffle(builder, product, product, list(range(i, 32, 2))) for i in (0, 1))
    builder.store(builder.add(builder.load(total), builder.add(even, odd)), total)


def _fold(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[list[int]]) -> ir.Value:
    return builder.add(*(_shuffle(builder, a, b, half) for half in lanes))


def _narrow(builder: ir.IRBuilder, source: ir.Value) -> ir.Value:
    """16 whole floats as i16[16]."""
    whole = builder.fptosi(_load(builder, _vector(_F32, 16), source), _vector(_I32, 16))
    return builder.trunc(whole, _vector(_I16, 16))


def _row_bytes(bits: int, channels: int) -> int:
    """Bytes of some channels of a row of codes."""
    return channels if bits == 8 else 4 * channels


def _vector(kind: ir.Type, lanes: int) -> ir.Type:
    return ir.VectorType(kind, lanes)


def _constant(value: int) -> ir.Value:
    return ir.Constant(_vector(_I32, LANES), [value] * LANES)


def _zeros(builder: ir.IRBuilder) -> ir.Value:
    """A variable of i32[16] that starts at zero; LLVM keeps it in a register."""
    return cgutils.alloca_once_value(builder, _constant(0))


def _splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    kind = _vector(value.type, lanes)
    return _shuffle(builder, builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0)), None, [0] * lanes)


def _shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value | None, order: list[int]) -> ir.Value:
    mask = ir.Constant(_vector(_I32, len(order)), order)
    return builder.shuffle_vector(a, ir.Constant(a.type, ir.Undefined) if b is None else b, mask)


def _shuffle_halves(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
    """Shuffle two i32[16] as i16[32]."""
    a, b = (builder.bitcast(x, _vector(_I16, 32)) for x in (a, b))
    return builder.bitcast(_shuffle(builder, a, b, order), _vector(_I32, LANES))


def _load(builder: ir.IRBuilder, kind: ir.Type, address: ir.Value, offset: int = 0) -> ir.Value:
    pointer = builder.inttoptr(builder.add(address, _WORD(offset)), kind.as_pointer())
    return builder.load(pointer, align=1)


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
    pointer = builder.inttoptr(builder.add(address, _WORD(offset)), value.type.as_pointer())
    builder.store(value, pointer, align=1)
