"""Affine quantisation of rows into packed codes."""

from pallas_kernels.quantize_pack.api import dequantize, quantize_pack

__all__ = ["dequantize", "quantize_pack"]
