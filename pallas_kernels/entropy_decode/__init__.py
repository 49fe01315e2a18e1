"""Decode attention over rows whose integer codes take a variable number of bits."""

from pallas_kernels.entropy_decode.api import entropy_decode

__all__ = ["entropy_decode"]
