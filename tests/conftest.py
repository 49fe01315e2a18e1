"""Strict JAX, several CPU devices, few and deterministic hypothesis examples; `--quick` for quick compilation.

Rank promotion raises. Dtype promotion stays standard: caches hold bfloat16 or float16 beside float32 accumulators, and
Flax's own layers mix them. Warnings are errors, see pyproject.toml.
"""

import ctypes
import gc
import importlib.metadata
import os
from pathlib import Path
from zlib import crc32

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 20, 100)  # tracing makes many objects, few of them garbage in cycles
settings.register_profile("few", max_examples=3, deadline=None, derandomize=True, database=None)
settings.load_profile("few")

_ROOM = 4 * 2**30  # bytes a worker may hold in compiled programs and arrays before it forgets them
_bound = [_ROOM]


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="compile quickly rather than well; without Numba's kernels")


def pytest_configure(config):
    """Compiling small programs is most of the tests' time."""
    if config.getoption("quick"):
        os.environ["KVCOMP_WITHOUT"] = "cpu"
        flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
        if importlib.metadata.version("jaxlib") < "0.11":  # later ones do not know this flag, and end
            flags.append("--xla_cpu_use_fusion_emitters=false")
        os.environ["XLA_FLAGS"] = " ".join([os.environ["XLA_FLAGS"], *flags])
        jax.config.update("jax_traceback_in_locations_limit", 0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of one file, or laws of one part, run in one worker: they share fixtures and compiled programs there."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        part = params.get("text", params.get("codec")) if item.path.parent.name == "laws" else None
        group = item.path.stem if part is None else f"{crc32(repr(part).encode()):x}"  # xdist takes no brackets
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _bounded_memory():
    """Hundreds of small compilations would otherwise add up to many gigabytes.

    What is freed goes back to the system only when it is asked to; what stays must not have every later test forget its
    programs, so that the bound moves up by it.
    """
    yield
    if _resident() > _bound[0]:
        jax.clear_caches()
        gc.collect()
        c = ctypes.CDLL(None)
        if hasattr(c, "malloc_trim"):
            c.malloc_trim(0)
        _bound[0] = max(_ROOM, _resident() + _ROOM // 4)


def _resident() -> int:
    """Bytes in memory, 0 where /proc does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
