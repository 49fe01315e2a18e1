"""Decode attention over selected pages."""

from pallas_kernels.gather_decode.api import gather_decode, page_top_k

__all__ = ["gather_decode", "page_top_k"]
