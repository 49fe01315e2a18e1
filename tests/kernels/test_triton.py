"""Triton kernels where the operations' cases do not reach: packed arithmetic in bfloat16, and its emulation."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("jax_triton", reason="needs jax-triton and a JAX with GPU support", exc_type=ImportError)

import jax
import triton
import triton.language as tl

import kvcomp_jax as kvc
from pallas_kernels import ptx_emulation, triton_calls
from pallas_kernels.dispatch import Target, compile_for
from pallas_kernels.quantized_decode import quantized_decode
from pallas_kernels.quantized_decode.cases import CASES, Case, channel, token
from tests.kernels.test_quantized_decode import assert_same_attention
from tests.laws.parts import make, qkv

pytestmark = pytest.mark.slow

PACKED = {
    **{name: CASES[name] for name in ("k2-channel-v2-token", "k3-channel-v3-token", "k8-channel-v8-token")},
    **{
        name: CASES[name] for name in ("k2-token-v4-channel", "k3-token-v8-channel", "symmetric-channel", "head_dim-80")
    },
    "groups that are no power of two": Case(channel(4, 96), token(4, 48), head_dim=96, num_kv_heads=1, num_slots=192),
    "words of different width in a group": Case(channel(4, 24), token(2), num_kv_heads=1, num_slots=240),
    "groups wider than a pass": Case(token(4, 128), token(4, 128), head_dim=128, num_kv_heads=1),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_arithmetic_equals_the_reference(name):
    case = dataclasses.replace(PACKED[name], dtype="bfloat16", length=(PACKED[name].num_slots, 100))
    args, options = case.arguments()
    want = quantized_decode(*args, **options, implementation="reference")
    got = quantized_decode(*args, **options, implementation="gpu", interpret=True)
    assert_same_attention(got, want, 2e-2)


@triton.jit
def _double(x):
    return tl.sum(x, 0) * 2


@triton.jit
def _kernel(x_ptr, out_ptr, size: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :])
    y = tl.dot(x, tl.trans(x)) + _double(x.to(tl.float32))[None, :]
    tl.store(out_ptr + tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :], y.to(tl.bfloat16))


def test_the_interpreter_rounds_bfloat16_and_calls_device_functions():
    x = np.random.default_rng(0).standard_normal((16, 16)).astype(ml_dtypes.bfloat16)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    (got,) = triton_calls.call(_kernel, [jax.numpy.asarray(x)], [shape], (1,), {"size": 16}, interpret=True)
    wide = x.astype(np.float32)
    np.testing.assert_array_equal(np.asarray(got), (wide @ wide.T + 2 * wide.sum(0)).astype(ml_dtypes.bfloat16))
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        tl.cdiv(3, 2)  # interpretation leaves triton.language as it was


def test_instructions_that_are_not_emulated_are_refused():
    with pytest.raises(NotImplementedError, match=r"xor\.b32"):
        ptx_emulation.run("{ xor.b32 $0, $1, $2; }", "=r,r,r", [np.zeros(2, np.uint32)], np.dtype(np.uint16), 2)


@pytest.mark.parametrize("method", ["packkv", "kvcomp"])
def test_a_decode_step_for_a_gpu_multiplies_codes_of_variable_length_as_it_decodes_them(method):
    cache = make(method, batch=1, num_kv_heads=2, max_len=512)
    with compile_for(Target("gpu", 90)):
        *_, rung = kvc.kernels_in_use(cache, num_heads=4)
        program = str(jax.make_jaxpr(kvc.decode)(cache, *qkv(0, 1, 1)))
    assert (rung.operation, rung.backend) == ("entropy_decode", "gpu")
    storage = {"packkv": "planes", "kvcomp": "streams"}[method]
    assert f"dot_{storage}" in program
    assert f"mix_{storage}" in program
