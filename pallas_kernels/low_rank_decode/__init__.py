"""Decode attention in the space of low-rank coefficients."""

from pallas_kernels.low_rank_decode.api import low_rank_decode

__all__ = ["low_rank_decode"]
