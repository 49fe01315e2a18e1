"""Causal attention of a prompt chunk, the attention mass that its keys received, and what policies need of both."""

from pallas_kernels.prefill.api import MASK_VALUE, mass, prefill, prefill_with_mass, probe_mass
from pallas_kernels.prefill.statistics import Statistics, prefill_with_statistics, statistics

__all__ = [
    "MASK_VALUE",
    "Statistics",
    "mass",
    "prefill",
    "prefill_with_mass",
    "prefill_with_statistics",
    "probe_mass",
    "statistics",
]
