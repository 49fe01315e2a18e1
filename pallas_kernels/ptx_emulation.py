"""The few PTX instructions of our inline assembly, executed by NumPy, so that interpreted kernels run the real text."""

import re
from collections.abc import Sequence

import ml_dtypes
import numpy as np


def run(asm: str, constraints: str, inputs: Sequence[np.ndarray], dtype: np.dtype, pack: int) -> np.ndarray:
    """Execute `{ instruction; ... }` on every `pack` neighbours of arrays of equal shape; `$0` is the only output.

    Raises:
      NotImplementedError: For an instruction that is not emulated.
    """
    shape = np.broadcast_shapes(*(x.shape for x in inputs))
    registers = {f"${i + 1}": x for i, x in enumerate(_registers(inputs, shape, pack))}
    if constraints != ",".join(["=r", *["r"] * len(registers)]):
        raise ValueError(f"constraints {constraints} do not fit {len(registers)} input registers.")
    for instruction in asm.strip("{} \n").split(";"):
        words = re.split(r"[\s,]+", instruction.strip())
        if words[0] and not words[0].startswith(".reg"):
            values = [registers[x] if x in registers else np.uint32(int(x, 0)) for x in words[2:]]
            registers[words[1]] = _execute(words[0], values)
    return np.ascontiguousarray(registers["$0"]).view(dtype).reshape(shape)


def _registers(inputs, shape, pack):
    for x in inputs:
        flat = np.ascontiguousarray(np.broadcast_to(x, shape)).reshape(-1, pack)
        if flat.itemsize == 4:
            yield from (flat[:, i].view(np.uint32) for i in range(pack))
        else:
            yield flat.view(np.uint32)[:, 0]


def _execute(name: str, x: list) -> np.ndarray:
    if name == "shr.b32":
        return x[0] >> x[1]
    if name == "shl.b32":
        return x[0] << x[1]
    if name == "prmt.b32":
        both = np.stack(np.broadcast_arrays(x[0], x[1]), -1).view(np.uint8)
        return both[..., [int(x[2]) >> 4 * i & 7 for i in range(4)]].copy().view(np.uint32)[..., 0]
    if name == "lop3.b32" and x[3] == 0xEA:
        return (x[0] & x[1]) | x[2]
    if name == "fma.rn.bf16x2":
        a, b, c = (np.ascontiguousarray(v).view(ml_dtypes.bfloat16).astype(np.float64) for v in x)
        return (a * b + c).astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint32)
    raise NotImplementedError(name)
