"""Decode attention on integer codes: both products multiply codes, and sums of codes correct for the offsets."""

from pallas_kernels.homomorphic_decode.api import homomorphic_decode
from pallas_kernels.homomorphic_decode.partitions import code_sums, sums_dtype

__all__ = ["code_sums", "homomorphic_decode", "sums_dtype"]
