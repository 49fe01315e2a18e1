"""Calls of Triton kernels from JAX: compiled through jax-triton, or interpreted on the CPU.

The interpreter is Triton's own, driven without TRITON_INTERPRET (which would have to be set before Triton is imported)
and without torch: a kernel gets the addresses of NumPy buffers. Triton's interpreter keeps bfloat16 as its bits and
would add and multiply those as integers; here bfloat16 is ml_dtypes' type, so casts, arithmetic and dots are right.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels import dispatch, ptx_emulation

_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "uint32": "u32", "uint8": "u8",
          "int8": "i8", "uint16": "u16", "int16": "i16", "bool": "i1"}  # fmt: skip
_one_at_a_time = threading.Lock()  # interpretation replaces functions of triton.language for its duration


def call(
    kernel: triton.JITFunction,
    arrays: Sequence[jax.Array],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    *,
    interpret: bool,
    num_warps: int = 4,
    num_stages: int = 3,
    fused_multiply_add: bool = True,
) -> list[jax.Array]:
    """Run a Triton kernel on arrays.

    Args:
      kernel: Its parameters are pointers to `arrays`, pointers to the outputs, then `constants`.
      arrays: Inputs; never written.
      out_shapes: Outputs; what the kernel does not store is undefined (interpreted: zero).
      grid: Programs along up to three axes.
      constants: The kernel's `tl.constexpr` parameters.
      interpret: Run on the CPU, one program after the other.
      num_warps, num_stages: Of the compiled kernel.
      fused_multiply_add: Whether the compiler may contract a product and a sum; no where every bit counts.
    """
    out_shapes = list(out_shapes)
    if interpret:
        run = functools.partial(_interpret, kernel, out_shapes, grid, dict(constants))
        return list(jax.pure_callback(run, out_shapes, *arrays))
    out = jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_shape=out_shapes,
        grid=grid,
        name=kernel.fn.__name__.strip("_"),
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=dispatch.target().capability or 90,
        enable_fp_fusion=fused_multiply_add,
        **constants,
    )
    return list(out)


def _interpret(kernel, out_shapes, grid, constants, *arrays):
    inputs = [np.ascontiguousarray(x) for x in arrays]
    outputs = [np.zeros(out.shape, out.dtype) for out in out_shapes]
    with _one_at_a_time, _interpreter_without_torch(), np.errstate(all="ignore"):
        program, builder = _Rewritten(_with_rewritten_helpers(kernel.fn)), interpreter.interpreter_builder
        builder.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
        for index in np.ndindex(*builder.grid_dim):
            builder.set_grid_idx(*index)
            program(*(_pointer(x) for x in (*inputs, *outputs)), **constants)
    return outputs


def _pointer(buffer: np.ndarray) -> tl.tensor:
    kind = tl.str_to_ty("*" + _TYPES[jnp.dtype(buffer.dtype).name], None)
    return tl.tensor(interpreter.TensorHandle(np.array([buffer.ctypes.data], np.uint64), kind), kind)


class _Rewritten(interpreter.InterpretedFunction):
    """A device function for the interpreter that leaves patching triton.language to whoever runs the kernel."""

    def __call__(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)


@functools.cache
def _with_rewritten_helpers(function):
    """A copy of a Python function whose module-level Triton functions are `_Rewritten`."""
    scope = dict(function.__globals__)
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__annotations__, copy.__module__ = function.__annotations__, function.__module__
    for name in function.__code__.co_names:
        if isinstance(scope.get(name), triton.JITFunction):
            scope[name] = _Rewritten(_with_rewritten_helpers(scope[name].fn))
    return copy


@contextlib.contextmanager
def _interpreter_without_torch() -> Iterator[None]:
    """Let triton.language run in its interpreter, its device functions and our inline assembly too; true bfloat16."""
    numpy_type, scope = interpreter._get_np_dtype, interpreter._LangPatchScope()

    def with_bfloat16(kind):
        scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return np.dtype(ml_dtypes.bfloat16) if scalar == tl.bfloat16 else numpy_type(kind)

    def cast(self, src, kind, rounding=None):
        return interpreter.TensorHandle(src.data.astype(with_bfloat16(kind)), kind.scalar)

    def inline_asm(self, asm, constraints, values, kinds, is_pure, pack):
        out = ptx_emulation.run(asm, constraints, [x.data for x in values], with_bfloat16(kinds[0]), pack)
        return SimpleNamespace(get_result=lambda index: interpreter.TensorHandle(out, kinds[0].scalar))

    def constant(self, value):
        return interpreter.TensorHandle(np.array([value], ml_dtypes.bfloat16), tl.bfloat16)

    scope.set_attr(interpreter, "_get_np_dtype", with_bfloat16)
    scope.set_attr(interpreter.InterpreterBuilder, "get_bf16", constant)
    scope.set_attr(interpreter.InterpreterBuilder, "create_inline_asm", inline_asm)
    scope.set_attr(interpreter.InterpreterBuilder, "cast_impl", cast)
    scope.set_attr(interpreter.InterpreterBuilder, "create_fp_to_fp", cast)
    for module in (tl.standard, tl):
        for name, member in inspect.getmembers(module, lambda x: isinstance(x, triton.JITFunction)):
            scope.set_attr(module, name, _standard(member.fn))
    scopes = [scope, *(interpreter._patch_lang(_seeing(module)) for module in (tl, tl.core))]
    scopes.append(interpreter._LangPatchScope())
    scopes[-1].set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())  # what NumPy 2.4 still converts
    try:
        yield
    finally:
        for scope in reversed(scopes):
            scope.restore()


@functools.cache
def _standard(function: Callable[..., Any]) -> _Rewritten:
    return _Rewritten(function)


def _seeing(module: ModuleType) -> FunctionType:
    """A function with this module among its globals: what the interpreter patches for a kernel."""
    return FunctionType((lambda: None).__code__, {"module": module})
