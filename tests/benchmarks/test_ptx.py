"""What is read of GPU kernels that are only lowered: no GPU and none of its tools."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.aot.ptx import dynamic_shared_bytes


def _copy(rows: int):
    """A Mosaic GPU kernel that copies through `rows` rows of 512 bytes of shared memory."""

    @functools.partial(
        plgpu.kernel,
        out_type=jax.ShapeDtypeStruct((rows, 128), jnp.float32),
        scratch_types=[plgpu.SMEM((rows, 128), jnp.float32), plgpu.Barrier()],
    )
    def copy(x_ref, out_ref, shared_ref, barrier):
        plgpu.copy_gmem_to_smem(x_ref, shared_ref, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(shared_ref, out_ref)
        plgpu.wait_smem_to_gmem(0)

    return copy


def _lowered(function, *shapes):
    traced = jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return traced.lower(lowering_platforms=("cuda",))


@pytest.mark.slow
def test_dynamic_shared_memory_is_that_of_the_kernel_with_most():
    small, large = (dynamic_shared_bytes(_lowered(_copy(rows), (rows, 128))) for rows in (16, 64))
    assert large - small == 48 * 512
    assert 16 * 512 <= small <= 16 * 512 + 1024  # and what a barrier takes
    both = _lowered(lambda x, y: (_copy(16)(x), _copy(64)(y)), (16, 128), (64, 128))
    assert dynamic_shared_bytes(both) == large


def test_a_program_without_mosaic_kernels_has_none():
    assert dynamic_shared_bytes(_lowered(jnp.sin, (16, 128))) == 0
