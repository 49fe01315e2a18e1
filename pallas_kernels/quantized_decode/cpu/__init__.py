"""Decode attention over packed rows on CPU, compiled by Numba."""

from pallas_kernels.quantized_decode.cpu.call import quantized_decode

__all__ = ["quantized_decode"]
