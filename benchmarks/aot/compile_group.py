"""Compile programs of one group for one device and print a JSON line for each: run as a process of its own.

A compiler that dies takes its process with it; whoever started this one sees which lines are missing.
"""

import json
import math
import os
import re
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.aot.programs import Program, programs
from benchmarks.aot.targets import DEVICES, compiling
from pallas_kernels.dispatch import Unsupported


def main(device_name: str, group: str, what: str, *names: str) -> None:
    """Compile programs of a group by name; `what` is "cases", or how many layers models have."""
    layers, cases = (0, True) if what == "cases" else (int(what), False)
    for program in programs(DEVICES[device_name], layers, cases=cases):
        if program.group == group and program.name in names:
            print("aot:" + json.dumps(record(device_name, program)), flush=True)


def record(device_name: str, program: Program) -> dict[str, Any]:
    """What the compiler says of one program."""
    found: dict[str, Any] = {
        "device": device_name,
        "group": program.group,
        "name": program.name,
        "expects_kernel": program.kernels,
    }
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as dump, compiling(DEVICES[device_name]) as place:
            os.environ.update(MOSAIC_GPU_DUMP_TO=dump, MOSAIC_GPU_DUMP_PTX="1")
            function, shapes = program.make()
            lowered = function.lower(*place(shapes))
            lowering = time.perf_counter() - start
            compiled = lowered.compile()
            figures = _gpu_figures(lowered, dump) if device_name == "h200" else {}
    except Unsupported as reason:
        return {**found, "refused": str(reason)}
    except Exception as error:
        return {**found, "error": f"{type(error).__name__}: {error}"[:2000]}
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        **found,
        "seconds": round(time.perf_counter() - start, 2),
        "lowering_seconds": round(lowering, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": len(re.findall(_KERNEL_CALL, text)),
        **vmem(text),
        "reads_codes": bool(_codes(shapes)),
        "decoded": decoded_arrays(text, shapes),
        **figures,
    }


_KERNEL_CALL = r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*|triton_kernel_call)"'


def _codes(shapes: Any) -> list[jax.ShapeDtypeStruct]:
    return [x for x in jax.tree.leaves(shapes) if jnp.issubdtype(x.dtype, jnp.unsignedinteger)]


def vmem(text: str) -> dict[str, int]:
    """Vector memory of the TPU kernel of a compiled program that has most: scratch, windows and spilled registers.

    It is what the compiler says that it granted. Not in it: the 36 kB that every kernel gets, and arrays that XLA keeps
    in vector memory by itself, which need no windows.
    """
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    granted = [re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', line) for line in calls]
    if not all(granted):
        raise ValueError("this compiler does not say how much vector memory a kernel uses.")
    sizes = [re.findall(r'"memory_space":"1",[^}]*"size":"(\d+)"', found[1]) for found in granted if found]
    return {"vmem_bytes": max(sum(map(int, found)) for found in sizes)} if sizes else {}


def decoded_arrays(text: str, shapes: Any) -> list[str]:
    """Float arrays of a compiled program that could be a decoded cache: as many values as an argument has codes.

    What has an axis of a weight matrix is none, and a bitcast stores nothing. Temporary bytes do not tell: on TPU they
    count caches that are fetched to VMEM ahead of their use, still packed.
    """
    codes = _codes(shapes)
    if not codes:
        return []
    fewest = max(x.size * (4 if x.dtype == jnp.uint32 else 1) for x in codes)  # a word holds four codes or more
    matrices = [x for x in jax.tree.leaves(shapes) if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating)]
    weights = {n for x in matrices for n in x.shape} - {n for x in codes for n in x.shape}
    given = set(re.findall(r"= (\w+\[[\d,]+\])\S* parameter\(", text))
    found = set()
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        if not computation.startswith("%fused_computation"):  # values inside a fusion are never stored
            found |= set(re.findall(r"= ((?:f32|bf16|f16)\[[\d,]+\])(?!\S* bitcast\()", computation))
    dims = {x: list(map(int, x[x.index("[") + 1 : -1].split(","))) for x in found - given}
    return sorted(x for x, shape in dims.items() if math.prod(shape) >= fewest and not weights & set(shape))


def _gpu_figures(lowered: Any, dump: str) -> dict[str, int]:
    """The worst of a program's kernels, Triton's from the program and Mosaic's from the folder they are dumped to."""
    from benchmarks.aot.ptx import dynamic_shared_bytes, kernel_figures

    mosaic, dynamic = kernel_figures(dump), dynamic_shared_bytes(lowered)
    for kernel in mosaic.values():
        kernel["shared_bytes"] += dynamic  # which kernel has most is not told: the worst of both
    kernels = [*kernel_figures(lowered).values(), *mosaic.values()]
    if not kernels:
        return {}
    return {name: max(kernel[name] for kernel in kernels) for name in ("registers", "spills", "shared_bytes")}


if __name__ == "__main__":
    main(*sys.argv[1:])
