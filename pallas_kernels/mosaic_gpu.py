"""What kernels in Pallas Mosaic GPU share: the interpreter's stand-ins, and register layouts written axis by axis.

The interpreter runs copies, barriers and arithmetic, but knows no register layouts, no tiled or transposed references
and no product with an operand in registers. `Machine` hides that: a kernel is written once, for either.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Unsupported

LANES, WARPS = 32, 4
WARPGROUP_ROWS = 64  # of the smallest product
LOG2E = math.log2(math.e)
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a value a row of an accumulator
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a value a column


def require_hopper(interpret: bool) -> None:
    """Raise `Unsupported` unless the target has wgmma and the copy engine, or the kernel is interpreted."""
    target = dispatch.target()
    if not interpret and (target.platform != "gpu" or target.capability < 90):
        raise Unsupported(f"Mosaic GPU kernels need capability 90 or newer, got {target}.")


def require_operands(**arrays: jax.Array) -> None:
    """Raise `Unsupported` unless arrays [..., S, D] can be copied as they are stored for the matrix unit to read."""
    for name, x in arrays.items():
        slots, dim = x.shape[-2:]
        if jnp.dtype(x.dtype) not in (jnp.bfloat16, jnp.float16):
            raise Unsupported(f"{name} are {x.dtype}; the matrix unit multiplies 16-bit floats and rounds longer ones.")
        if dim % 16 or dim > 256:
            raise Unsupported(f"head_dim={dim} must be a multiple of 16 up to 256.")
        if slots % 8:
            raise Unsupported(f"{slots} slots are not whole tiles of 8, in which the copy engine brings an operand.")


@dataclasses.dataclass(frozen=True)
class Machine:
    """The device, or its interpreter on CPU."""

    interpret: bool

    def kernel(
        self, body: Callable, out_type: Any, grid: dict[str, int], scratch: Any, *, warpgroups: int = 1, **options: Any
    ) -> Callable:
        """`plgpu.kernel` over a named grid; options of `plgpu.CompilerParams`. Several warpgroups are axis "wg"."""
        threads: dict = {"num_threads": warpgroups, "thread_name": "wg"} if warpgroups > 1 else {}
        params: Any = None
        if self.interpret:
            # Not exported by JAX 0.10. Reads beyond an array give zeros, as the copy engine's do.
            from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

            params = InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
        return plgpu.kernel(
            body,
            out_type=out_type,
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(**options),
            interpret=params,
            **threads,
        )

    def claim_registers(self, readers: int, registers: tuple[int, int], *, fetches: bool) -> None:
        """Move registers from the warpgroup that fetches to two that compute; one has all it can use.

        Args:
          readers: Warpgroups that compute.
          registers: Of a thread that computes, and of one that fetches.
          fetches: Which of them this is.
        """
        if readers > 1 and not self.interpret:
            plgpu.set_max_registers(registers[fetches], action="decrease" if fetches else "increase")

    def load(self, ref: Any, layout: Any) -> jax.Array:
        """Load all of a reference into registers laid out so."""
        if self.interpret:
            return ref[...]
        index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # JAX 0.11 drops it
        return plgpu.load(ref, *index, layout=layout, optimized=False)

    def cast(self, x: jax.Array, layout: Any) -> jax.Array:
        """Change the layout of x in registers."""
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def full(self, shape: tuple[int, ...], value: float, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
        """A float32 constant in registers."""
        return self.cast(jnp.full(shape, value, jnp.float32), layout)

    def iota(self, shape: tuple[int, ...], axis: int, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
        """Indices along an axis, i32."""
        return self.cast(lax.broadcasted_iota(jnp.int32, shape, axis), layout)

    def reciprocal(self, x: jax.Array, layout: Any) -> jax.Array:
        """1 / x of float32 in registers laid out so, rounded to nearest: the compiler's own division is not."""
        if self.interpret:
            return 1.0 / x
        out = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout)
        return plgpu.inline_mgpu(arg_types=(layout,), return_type=out)(lambda _, x: _reciprocal(x))(x)

    def store_transposed(self, x: jax.Array, ref: Any) -> None:
        """Write an accumulator's worth of x [m, n] to a tiled reference [n, m], for the matrix unit to read."""
        if self.interpret:
            ref[...] = x.T
        else:
            plgpu.transpose_ref(ref, (1, 0))[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

    def dot(self, acc: jax.Array, a: Any, b_ref: Any, *, contract: int = 1) -> jax.Array:
        """acc [m, n] + a [m, k] times b, summed over axis `contract` of b; b is in shared memory, a there or not."""
        if self.interpret:
            dims = (((1,), (contract,)), ((), ()))
            return acc + lax.dot_general(a[...], b_ref[...], dims, preferred_element_type=jnp.float32)

        def product(acc_ref):
            plgpu.wgmma(acc_ref, a, plgpu.transpose_ref(b_ref, (1, 0)) if contract else b_ref)

        return pl.run_state(product)(plgpu.ACC.init(acc))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows that programs share: each has one or two warpgroups that compute, 64 rows each, and one that fetches."""

    machine: Machine
    num_rows: int

    @property
    def readers(self) -> int:
        """Warpgroups of a program that compute."""
        return min(2, pl.cdiv(self.num_rows, WARPGROUP_ROWS))

    @property
    def block(self) -> int:
        """Rows of a program."""
        return self.readers * WARPGROUP_ROWS

    @property
    def num_blocks(self) -> int:
        """Programs."""
        return pl.cdiv(self.num_rows, self.block)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers in shared memory that one warpgroup fills, step by step, and others read.

    Attributes:
      buffers: References [stages, ...].
      full, free: Barriers of each stage: copied, and read by all.
    """

    buffers: Sequence[Any]
    full: Any
    free: Any

    @staticmethod
    def scratch(stages: int, readers: int, *buffers: Any) -> tuple:
        """Scratch types of a ring that `readers` warpgroups read; buffers are of all stages."""
        arrivals = {"full": len(buffers), "free": readers}
        return (tuple(buffers), *(plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in arrivals.values()))

    def fill(self, i: jax.Array, *sources: Any) -> None:
        """Start the copies of step i, from global memory, once its stage is free."""
        stages = self.buffers[0].shape[0]
        stage = lax.rem(i, stages)

        @pl.when(i >= stages)
        def _():
            plgpu.barrier_wait(self.free.at[stage])

        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[stage], self.full.at[stage])

    def drain(self, steps: jax.Array) -> None:
        """Wait until what was filled in `steps` steps has been read: no barrier may be left with a phase unseen."""
        for stage in range(self.buffers[0].shape[0]):

            @pl.when(stage < steps)
            def _(stage=stage):
                plgpu.barrier_wait(self.free.at[stage])

    def take(self, i: jax.Array) -> list[Any]:
        """Wait for the buffers of step i."""
        stage = lax.rem(i, self.buffers[0].shape[0])
        plgpu.barrier_wait(self.full.at[stage])
        return [buffer.at[stage] for buffer in self.buffers]

    def release(self, i: jax.Array) -> None:
        """Say that this warpgroup has read step i."""
        plgpu.barrier_arrive(self.free.at[lax.rem(i, self.buffers[0].shape[0])])


def _reciprocal(x: Any) -> Any:
    """Of each element of a fragmented array."""
    f32, registers = ir.F32Type.get(), np.empty(x.registers.shape, object)
    for index, register in np.ndenumerate(x.registers):
        elements = [vector.extract(register, [], [i]) for i in range(ir.VectorType(register.type).shape[0])]
        elements = [llvm.inline_asm(f32, [e], "rcp.rn.f32 $0, $1;", "=f,f") for e in elements]
        registers[index] = vector.from_elements(register.type, elements)
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def tanh(x: jax.Array) -> jax.Array:
    """By exp2, since the hardware's tanh has 11 bits."""
    return 1.0 - 2.0 / (jnp.exp2(x * (2 * LOG2E)) + 1.0)


def along(x: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """Repeat a vector that runs along `axis` to the shape of `like`."""
    return lax.broadcast_in_dim(x, like.shape, (axis,))


def operand(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory tiled and swizzled as the matrix unit reads it."""
    bits = jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


@dataclasses.dataclass(frozen=True)
class Registers:
    """Which thread and register holds which element, axis by axis.

    Each axis of an array is cut into named factors, the major first, e.g. 128 rows into (("warp", 4), ("i", 32)).

    Attributes:
      axes: Factors of each axis. The last factor of the last axis is the vector that a register holds.
      warp: Names of factors that select the warp, the major first; an int is that many copies.
      lane: The same for the thread in its warp.
    """

    axes: tuple[tuple[tuple[str, int], ...], ...]
    warp: tuple[str | int, ...]
    lane: tuple[str | int, ...]

    def __post_init__(self):
        for names, size in ((self.warp, WARPS), (self.lane, LANES)):
            if math.prod(n if isinstance(n, int) else self.sizes[n] for n in names) != size:
                raise ValueError(f"{names} of {self.axes} must have {size} values.")

    @property
    def factors(self) -> tuple[tuple[str, int], ...]:
        """All factors in order."""
        return tuple(factor for axis in self.axes for factor in axis)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each factor."""
        return dict(self.factors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(math.prod(size for _, size in axis) for axis in self.axes)

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the factors that tell a thread's registers apart, in order."""
        taken = {*self.warp, *self.lane, self.factors[-1][0]}
        return tuple(name for name, _ in self.factors if name not in taken)

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Their sizes: the array of a thread's registers."""
        return tuple(self.sizes[name] for name in self.held)

    def layout(self) -> Any:
        """The same for Pallas: each tile cuts one factor off the one before."""
        tile, tiles = list(self.shape), [self.shape]
        for i, axis in enumerate(self.axes):
            for _, size in axis:
                tile[i] //= size
                tiles.append(tuple(tile))
        # The last cut would take the vector apart.
        tiling = plgpu.Tiling(tuple(tiles[:-1])).canonicalize()
        at = self._positions(tiling.tile_shape(self.shape)[len(self.shape) :])
        return plgpu.Layout.TILED(tiling, self._dims(self.warp, at), self._dims(self.lane, at), -1)

    def _dims(self, names: tuple[str | int, ...], at: dict[str, int]) -> tuple:
        """The tiled dimensions that select a warp or a lane; those of size 1 are not written."""
        dims = (plgpu.Replicated(name) if isinstance(name, int) else at.get(name) for name in names if name != 1)
        return tuple(dim for dim in dims if dim is not None)

    def _positions(self, tiled: Sequence[int]) -> dict[str, int]:
        """Where each factor is among the tiled dimensions, which are the factors in order with ones in between."""
        names = iter(name for name, size in self.factors if size != 1)
        return {next(names): i - len(tiled) for i, size in enumerate(tiled) if size != 1}
