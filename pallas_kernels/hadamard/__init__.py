"""Rotation of rows by an orthonormal Hadamard matrix, alone or fused into quantisation."""

from pallas_kernels.hadamard.api import hadamard, rotate_quantize_pack
from pallas_kernels.hadamard.matrix import hadamard_matrix

__all__ = ["hadamard", "hadamard_matrix", "rotate_quantize_pack"]
