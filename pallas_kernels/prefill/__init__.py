"""Causal attention of a prompt chunk, and the attention mass that its keys received."""

from pallas_kernels.prefill.api import MASK_VALUE, mass, prefill

__all__ = ["MASK_VALUE", "mass", "prefill"]
