"""Numba functions as custom calls of XLA's CPU backend, on XLA's own threads.

XLA calls a C function with a frame that points to the buffers: its typed FFI, whose C structs (`xla/ffi/api/c_api.h`,
version 0.3, to which releases only append) are read here by offset. No Python runs and no lock of it is taken.
Tasks are claimed from a counter by the calling thread and by helpers on XLA's pool. The caller waits for claimed tasks
alone, so a busy pool, or one of a single thread, delays nothing; a helper that starts late finds no task, touches only
the job's counters, and the last one to leave frees them.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

_API, _CONTEXT, _ARGS, _RESULTS, _ATTRIBUTES = 16, 24, 72, 112, 160  # of XLA_FFI_CallFrame
_DESTROY, _SCHEDULE, _NUM_THREADS = 64, 136, 144  # functions of XLA_FFI_Api
_NEXT, _DONE, _REFERENCES, _TASKS, _FRAME, _RUN, _CALL, _JOB_BYTES = 0, 64, 128, 192, 200, 208, 216, 256  # of a job

malloc = types.ExternalFunction("malloc", types.intp(types.intp))
free = types.ExternalFunction("free", types.void(types.intp))
_yield = types.ExternalFunction("sched_yield", types.int32())
_inlined = njit(inline="always")
_kept: list = []  # compiled code must outlive every program that calls it


def register(name: str, run: Callable) -> None:
    """Compile a custom call and register it as target `name`, unique in the process; `call` uses it.

    Args:
      name: XLA keeps it in what it compiles, so equal names must mean equal functions in every process.
      run: Python function (frame, task) for Numba: does one task; called from several threads at once.
    """
    compiled = cfunc(types.void(types.intp, types.intp), fastmath=True, error_model="numpy")(run)
    serve, address = _serve().address, compiled.address

    @cfunc(types.intp(types.intp))
    def handle(frame):
        return call_address(serve, frame, address)

    _kept.append((compiled, handle))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handle.ctypes), platform="cpu")


def call(name: str, results: Sequence[jax.ShapeDtypeStruct], num_tasks: int, *operands: jax.Array) -> list[jax.Array]:
    """Call a registered target: `run` once for each of `num_tasks`, in any order and several at a time."""
    target = jax.ffi.ffi_call(name, results, vmap_method="sequential")
    return target(*operands, num_tasks=np.int64(num_tasks))


def _read(builder: ir.IRBuilder, address: ir.Value, offset: int) -> ir.Value:
    at = builder.add(address, address.type(offset))
    return builder.load(builder.inttoptr(at, address.type.as_pointer()))


def _buffer(buffers: int, doc: str) -> Callable:
    """Make an intrinsic (frame, i): where the i-th of an array of buffers begins."""

    def codegen(context, builder, signature, args):
        frame, i = args
        described = builder.add(_read(builder, frame, buffers), builder.shl(i, i.type(3)))
        return _read(builder, _read(builder, described, 0), 24)

    @intrinsic
    def read(typingctx, frame, i):
        return types.intp(types.intp, types.intp), codegen

    read.__doc__ = doc
    return read


def _size(buffers: int, doc: str) -> Callable:
    """Make an intrinsic (frame, i, axis): extent of the i-th of an array of buffers."""

    def codegen(context, builder, signature, args):
        frame, i, axis = args
        described = builder.add(_read(builder, frame, buffers), builder.shl(i, i.type(3)))
        shape = _read(builder, _read(builder, described, 0), 40)
        return _read(builder, builder.add(shape, builder.shl(axis, i.type(3))), 0)

    @intrinsic
    def read(typingctx, frame, i, axis):
        return types.intp(types.intp, types.intp, types.intp), codegen

    read.__doc__ = doc
    return read


argument = _buffer(_ARGS, "Address of operand i's first byte.")
result = _buffer(_RESULTS, "Address of result i's first byte.")
argument_size = _size(_ARGS, "Extent of operand i along an axis.")
result_size = _size(_RESULTS, "Extent of result i along an axis.")


@intrinsic
def word(typingctx, address):
    """Read 64 bits."""

    def codegen(context, builder, signature, args):
        return _read(builder, args[0], 0)

    return types.intp(types.intp), codegen


@intrinsic
def pointer(typingctx, address, dtype):
    """Turn an address into a pointer, which is indexed as in C."""
    kind = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.intp, dtype), codegen


@intrinsic
def floats(typingctx, address):
    """Turn an address into a pointer to float32."""
    kind = types.CPointer(types.float32)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.intp), codegen


@intrinsic
def address(typingctx, pointer):
    """Turn a pointer back into an address."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], context.get_value_type(types.intp))

    return types.intp(pointer), codegen


@intrinsic
def float_from_bits(typingctx, bits):
    """Read 32 bits as a float."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def call_address(typingctx, function, *arguments):
    """Call the C function at an address; it takes words and returns one."""

    def codegen(context, builder, signature, args):
        word = args[0].type
        words = [builder.extract_value(args[1], i) for i in range(len(signature.args[1]))]
        target = ir.FunctionType(word, [word] * len(words)).as_pointer()
        return builder.call(builder.inttoptr(args[0], target), words)

    return types.intp(types.intp, types.StarArgTuple(arguments)), codegen


@functools.cache
def _serve():
    """Compile what answers XLA: (frame, address of `run`)."""

    @cfunc(types.void(types.intp))
    def help_out(job):
        _work(job)
        _release(job)

    helper = help_out.address

    @cfunc(types.intp(types.intp, types.intp))
    def serve(frame, run):
        if _answered_version(frame):
            return 0
        job = malloc(_JOB_BYTES)
        num_tasks = word(word(word(word(frame + _ATTRIBUTES)) + 8))
        for field, value in (
            (_NEXT, 0),
            (_DONE, 0),
            (_REFERENCES, 1),
            (_TASKS, num_tasks),
            (_FRAME, frame),
            (_RUN, run),
        ):
            _store(job + field, value)
        if num_tasks > 1:
            _call_for_help(frame, job, helper)
        _work(job)
        while _add(job + _DONE, 0) < num_tasks:
            _yield()
        _release(job)
        return 0

    _kept.append(help_out)
    return serve


@_inlined
def _answered_version(frame):
    """Tell XLA, when it asks, for which version of its structs this was written."""
    extension = word(frame + 8)
    if extension == 0 or word(extension + 8) & 0xFFFFFFFF != 1:
        return False
    metadata = word(extension + 24)
    _store(metadata + 24, 3 << 32)  # i32 major 0, i32 minor 3
    return True


@_inlined
def _call_for_help(frame, job, helper):
    """Schedule the helper on as many threads as there are tasks and threads beside the caller's."""
    api, context, args = word(frame + _API), word(frame + _CONTEXT), job + _CALL
    _fill(args, 32, context, args + 32, 0)
    if _failed(api, _NUM_THREADS, args):
        return
    for _ in range(min(word(args + 32), word(job + _TASKS)) - 1):
        _add(job + _REFERENCES, 1)
        _fill(args, 40, context, helper, job)
        if _failed(api, _SCHEDULE, args):
            _add(job + _REFERENCES, -1)
            return


@njit
def _failed(api, function, args):
    """Call a function of the API; forget an error, if it returns one: without a pool the caller does all."""
    error = call_address(word(api + function), args)
    if error == 0:
        return False
    _fill(args, 24, error, 0, 0)
    call_address(word(api + _DESTROY), args)
    return True


@_inlined
def _fill(args, size, first, second, third):
    """Write arguments of a function of the API: their size, no extension, and up to three words."""
    _store(args, size)
    _store(args + 8, 0)
    _store(args + 16, first)
    _store(args + 24, second)
    _store(args + 32, third)


@njit
def _work(job):
    """Claim tasks until none is left."""
    num_tasks, frame, run = word(job + _TASKS), word(job + _FRAME), word(job + _RUN)
    task = _add(job + _NEXT, 1)
    while task < num_tasks:
        call_address(run, frame, task)
        _add(job + _DONE, 1)
        task = _add(job + _NEXT, 1)


@njit
def _release(job):
    if _add(job + _REFERENCES, -1) == 1:
        free(job)


@intrinsic
def _store(typingctx, address, value):
    """Write 64 bits."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def _add(typingctx, address, value):
    """Add atomically; returns what was there."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.intp(types.intp, types.intp), codegen
