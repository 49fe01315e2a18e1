"""Decode attention over rows whose codes stand for levels that lie anywhere."""

from pallas_kernels.codebook_decode.api import codebook_decode

__all__ = ["codebook_decode"]
