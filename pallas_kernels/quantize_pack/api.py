"""Public functions of quantisation: checks and dispatch."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.finite import check_finite
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.packing import pack_unit
from pallas_kernels.quantize_pack import reference


def quantize_pack(
    x: jax.Array,
    fmt: Format,
    *,
    dither: jax.Array | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Quantized:
    """Quantise rows to packed codes with a scale and zero point a group, in one pass over x.

    Values must be finite: codes of a group with NaN or infinities mean nothing. Under `jax.experimental.checkify` they
    are an error; otherwise nothing looks.

    Args:
      x: [*b, S, D], f32 or bf16. S a multiple of the tokens that share words and, per channel, of `group_size`.
      fmt: Bits, axis and group size.
      dither: f32 of x's shape, uniform in [0, 1), for stochastic rounding: up with the probability of the fraction, so
        that codes are right on average. None rounds to the nearest. Only plain JAX takes it so far.
      implementation: See `pallas_kernels.dispatch.call`.
      interpret: Run a Pallas or Triton backend in its interpreter.

    Raises:
      ValueError: If `fmt` does not divide x, or dither has another shape.
    """
    check_groups(x, fmt)
    check_finite(x, "quantize_pack")
    if dither is None:
        return dispatch.call("quantize_pack", implementation, x, fmt, interpret=interpret)
    if dither.shape != x.shape:
        raise ValueError(f"dither {dither.shape} must have the shape of x {x.shape}.")
    function = "quantize_pack_dithered"
    return dispatch.call("quantize_pack", implementation, x, fmt, dither, function=function, interpret=interpret)


def check_groups(x: jax.Array, fmt: Format) -> None:
    """Raise ValueError unless the words and groups of `fmt` divide x [*b, S, D]."""
    *_, num_tokens, dim = x.shape
    unit = pack_unit(fmt.bits)
    if num_tokens % unit:
        raise ValueError(f"x {x.shape} must have a multiple of {unit} tokens at {fmt.bits} bits.")
    size = dim if fmt.axis == "token" else num_tokens
    if size % fmt.group_size:
        raise ValueError(f"group_size={fmt.group_size} must divide {size}, the {fmt.axis} groups' extent of {x.shape}.")


def dequantize(enc: Quantized, fmt: Format) -> jax.Array:
    """Undo `quantize_pack` up to its error: f32[*b, S, D]. The definition; no kernel of ours writes this to memory."""
    return reference.dequantize(enc, fmt)
