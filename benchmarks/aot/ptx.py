"""What the GPU compiler made of a kernel: registers, spills, shared memory, instructions of the inner loop.

Needs `ptxas` and `cuobjdump`, which Triton's package carries; no GPU.
"""

import functools
import re
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import jax
from jaxlib.mlir import ir

_KERNEL, _KERNEL_CALL = 1, 1  # fields of jaxlib's protocol buffers of a Triton call
_NAME, _SHARED, _PTX = 1, 3, 4  # fields of its kernel


class Figures(TypedDict):
    """Of one kernel; sizes in bytes, registers a thread."""

    registers: int
    spills: int  # bytes stored to and loaded from local memory because registers ran out
    shared_bytes: int
    loop_instructions: int  # of the longest loop, a warp
    instructions: dict[str, int]  # of that loop, by name, the most frequent ones


def kernel_figures(source: jax.stages.Lowered | str | Path, *, target: str = "sm_90a") -> dict[str, Figures]:
    """Compile the kernels of a program to machine code and count.

    Args:
      source: A lowered program, of whose Triton calls PTX is at hand; or a folder with PTX files below it, as Mosaic
        GPU (MOSAIC_GPU_DUMP_TO, MOSAIC_GPU_DUMP_PTX) and jax-triton (JAX_TRITON_DUMP_DIR) leave them.
      target: What `ptxas` compiles for.

    Returns:
      Figures by kernel name, numbered from the second of a name on. Of Mosaic's kernels `shared_bytes` is the static
      part alone, usually one byte; `dynamic_shared_bytes` has the rest.

    Raises:
      RuntimeError: If `ptxas` refuses a kernel.
    """
    figures: dict[str, Figures] = {}
    for name, ptx, dynamic in _calls(source) if isinstance(source, jax.stages.Lowered) else _files(Path(source)):
        number = sum(known.split("#")[0] == name for known in figures)
        figures[f"{name}#{number + 1}" if number else name] = _figures(ptx, dynamic, target)
    return figures


def dynamic_shared_bytes(lowered: jax.stages.Lowered) -> int:
    """Dynamic shared memory of the Mosaic GPU kernel of a lowered program that has most; 0 if it holds none.

    PTX does not tell: it is an operand of the launch, which is part of the module that the custom call carries.
    """
    return max(_launches(lowered), default=0)


@functools.lru_cache(maxsize=64)  # a model's layers have the same kernels
def _figures(ptx: str, dynamic_shared: int, target: str) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        said = subprocess.run(
            [_tool("ptxas"), "-v", "--gpu-name", target, source, "-o", binary], capture_output=True, text=True
        )
        if said.returncode:
            raise RuntimeError(f"ptxas: {said.stderr.strip()[:500]}")
        sass = subprocess.run([_tool("cuobjdump"), "-sass", binary], capture_output=True, text=True, check=True).stdout

    def largest(pattern: str) -> int:
        return max((int(x) for x in re.findall(pattern, said.stderr)), default=0)

    loop = _longest_loop(sass)
    return Figures(
        registers=largest(r"Used (\d+) registers"),
        spills=largest(r"(\d+) bytes spill stores") + largest(r"(\d+) bytes spill loads"),
        shared_bytes=dynamic_shared + largest(r"(\d+) bytes smem"),
        loop_instructions=len(loop),
        instructions=dict(Counter(loop).most_common(12)),
    )


def _longest_loop(sass: str) -> list[str]:
    """Names of the instructions between a backward branch and where it leads, farthest apart."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);", sass, re.M)
    code = [(int(address, 16), name, rest) for address, name, rest in found]
    loops = [(0, -1)]
    for address, name, rest in code:
        to = re.search(r"0x([0-9a-f]+)", rest)
        if name == "BRA" and to and int(to[1], 16) < address:
            loops.append((int(to[1], 16), address))
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    return [name for address, name, _ in code if first <= address <= last]


def _files(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Name, PTX and dynamic shared memory of every kernel below a folder."""
    for path in sorted(folder.rglob("*.ptx")):
        beside = path.with_suffix(".compile_info")  # jax-triton's
        shared = re.search(r"shared_mem_bytes: *(\d+)", beside.read_text()) if beside.exists() else None
        yield path.stem, path.read_text(), int(shared[1]) if shared else 0


def _calls(lowered: jax.stages.Lowered) -> Iterator[tuple[str, str, int]]:
    """The same of every Triton call in a lowered program."""
    for op in _operations(lowered.compiler_ir("stablehlo").operation):
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == "triton_kernel_call":
            call = dict(_fields(zlib.decompress(op.attributes["backend_config"].value_bytes)))
            kernel = dict(_fields(dict(_fields(call[_KERNEL_CALL]))[_KERNEL]))
            yield kernel[_NAME].decode().strip("_"), kernel[_PTX].decode(), kernel.get(_SHARED, 0)


def _launches(lowered: jax.stages.Lowered) -> Iterator[int]:
    """What every Mosaic GPU kernel is launched with, in bytes: a constant, the last operand of its launch."""
    root = lowered.compiler_ir("stablehlo").operation
    root.context.allow_unregistered_dialects = True  # of the modules' own, versioned operations
    for op in _operations(root):
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value.startswith("mosaic_gpu"):
            module = ir.Module.parse(op.attributes["mhlo.backend_config"]["module"].value_bytes, root.context)
            (launch,) = (inner for inner in _operations(module.operation) if inner.name.endswith("gpu.launch"))
            yield launch.operands[len(launch.operands) - 1].owner.attributes["value"].value


def _operations(op: Any) -> Iterator[Any]:
    yield op
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from _operations(inner.operation)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields, without its description."""
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            size = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
            yield tag >> 3, message[at : at + size]
            at += size


def _tool(name: str) -> str:
    """A tool of the CUDA packages that JAX brings, else of Triton's: an older one does not know Mosaic's PTX."""
    import nvidia
    import triton.backends.nvidia

    folders = [
        *(Path(root, "cu13", "bin") for root in nvidia.__path__),
        Path(triton.backends.nvidia.__path__[0], "bin"),
    ]
    return str(next(folder / name for folder in folders if (folder / name).exists()))
