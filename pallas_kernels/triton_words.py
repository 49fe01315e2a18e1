"""Words of packed codes to operands of products, in Triton: loads, shifts, and inline assembly on pairs."""

import triton
import triton.language as tl


@triton.constexpr_function
def per_word(bits: int) -> int:
    """Tokens that one load of a word serves; more than 8 bits are dense rows.

    At 2 and 3 bits half of the word's 16: accumulators of as many tokens at once would not fit the registers.
    """
    return 8 if bits < 8 else 1


@triton.constexpr_function
def bias_of(bits, dtype):
    """What `biased_codes` leaves in: the float whose bits a code joins, exact in bfloat16 up to 7 bits."""
    return 128.0 if bits < 8 and dtype == tl.bfloat16 else 0.0


@triton.jit
def load_words(
    ptr, head, unit, place: tl.constexpr, places: tl.constexpr, channel, exists,
    num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """What holds the codes at one place of each unit, shaped like `unit` x `channel`: bytes, words, or dense rows.

    Shifted so that a token's bits are where its place says. At 3 bits also the words of the high bits; else twice.
    """
    size: tl.constexpr = per_word(bits)
    part = tl.minimum(unit * (places // size) + place // size, num_slots // size - 1)
    ptr += head * (num_slots if bits >= 8 else num_slots * bits // 32) * dim
    if bits == 3:
        low = tl.load(ptr + (part // 4 * 3 + part // 2 % 2) * dim + channel, mask=exists, other=0)
        high = tl.load(ptr + (part // 4 * 3 + 2) * dim + channel, mask=exists, other=0)
        return low >> (part % 2 * 16).to(tl.uint32), high >> (part % 4 * 8).to(tl.uint32)
    elif bits == 2:
        low = tl.load(ptr + part // 2 * dim + channel, mask=exists, other=0) >> (part % 2 * 16).to(tl.uint32)
        return low, low
    else:
        low = tl.load(ptr + part * dim + channel, mask=exists, other=0)
        return low, low


@triton.jit
def codes_in_order(
    ptr, head, start, channel, exists,
    tile: tl.constexpr, num_slots: tl.constexpr, dim: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """Codes of consecutive slots, [tile, channels]: bytes at 8 bits, else u32."""
    size: tl.constexpr = per_word(bits)
    unit = start // size + tl.arange(0, tile // size)
    low, high = load_words(ptr, head, unit[:, None], 0, size, channel[None, :], exists[None, :], num_slots, dim, bits)
    if bits == 8:
        return low
    else:
        width: tl.constexpr = 2 if bits == 3 else bits
        place = tl.arange(0, size)[None, :, None].to(tl.uint32)
        codes = (low[:, None, :] >> place * width) & ((1 << width) - 1)
        if bits == 3:
            codes |= (high[:, None, :] >> place & 1) << 2
        return tl.reshape(codes, (tile, channel.shape[0]))


@triton.jit
def biased_codes(low, high, bits: tl.constexpr, place: tl.constexpr, dtype: tl.constexpr):
    """Codes at one place in bfloat16, which holds them, `bias_of` products in `dtype` added."""
    if bits == 8:
        codes = (low.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        return codes.to(tl.bfloat16)
    elif bias_of(bits, dtype) > 0:
        args = [low, high] if bits == 3 else [low]
        return tl.inline_asm_elementwise(
            _asm(bits, place, False), _constraints(bits, False), args, tl.bfloat16, True, 2
        )
    else:
        one = tl.full(low.shape, 1.0, tl.bfloat16)
        return scaled_codes(low, high, one, one * -128.0, bits, place)


@triton.jit
def scaled_codes(low, high, scale, shift, bits: tl.constexpr, place: tl.constexpr):
    """Codes at one place times scales, in bfloat16; `shift` takes the bias off."""
    args = [low, high, scale, shift] if bits == 3 else [low, scale, shift]
    return tl.inline_asm_elementwise(_asm(bits, place, True), _constraints(bits, True), args, tl.bfloat16, True, 2)


@triton.constexpr_function
def _asm(bits, place, scaled):
    """Two words to two codes in bfloat16: a code joins the bits of 128.0; if scaled, times $a plus $b = -128 $a."""
    width = 2 if bits == 3 else bits
    shift, mask = place * width, (1 << width) - 1
    text = f"prmt.b32 t, $1, $2, {'0x5410' if shift < 16 else '0x7632'}; shr.b32 t, t, {shift % 16};"
    text += f" lop3.b32 t, t, {mask * 0x10001:#x}, 0x43004300, 0xEA;"
    if bits == 3:
        move = f"shr.b32 u, u, {place - 2}" if place >= 2 else f"shl.b32 u, u, {2 - place}"
        text += f" prmt.b32 u, $3, $4, 0x5410; {move}; lop3.b32 t, u, 0x40004, t, 0xEA;"
    first = 5 if bits == 3 else 3
    end = f"fma.rn.bf16x2 $0, t, ${first}, ${first + 1};" if scaled else "shr.b32 $0, t, 0;"
    return "{ .reg .b32 t; .reg .b32 u; " + text + " " + end + " }"


@triton.constexpr_function
def _constraints(bits, scaled):
    return ",".join(["=r", *["r"] * ((4 if bits == 3 else 2) + 2 * scaled)])
