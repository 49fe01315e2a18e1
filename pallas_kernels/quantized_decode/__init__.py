"""Decode attention over packed keys and values."""

from pallas_kernels.quantized_decode.api import quantized_decode

__all__ = ["quantized_decode"]
