"""Rotation of rows by an orthonormal Hadamard matrix, alone or fused into quantisation."""

from pallas_kernels.hadamard.api import hadamard, hadamard_blocks, rotate_quantize_pack
from pallas_kernels.hadamard.matrix import check_hadamard, hadamard_matrix, largest_order, rotate_blocks_host

__all__ = [
    "check_hadamard",
    "hadamard",
    "hadamard_blocks",
    "hadamard_matrix",
    "largest_order",
    "rotate_blocks_host",
    "rotate_quantize_pack",
]
