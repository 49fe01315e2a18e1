"""Calls of kernels from a program."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.dispatch import Target, Unsupported, compile_for, recording
from pallas_kernels.hadamard import hadamard
from pallas_kernels.low_rank_decode import low_rank_decode
from pallas_kernels.prefill import prefill
from pallas_kernels.quantized_decode import quantized_decode, reference
from pallas_kernels.quantized_decode.cases import CASES


def test_calls_that_are_alike_are_traced_once_in_a_program(monkeypatch):
    traced, definition = [], reference.quantized_decode

    def counted(*args, **options):
        traced.append(1)
        return definition(*args, **options)

    monkeypatch.setattr(reference, "quantized_decode", counted)
    args, options = next(iter(CASES.values())).arguments()

    def layers(q):
        for _ in range(3):
            q = quantized_decode(q, *args[1:], **options, implementation="reference")[0]
        return q

    jax.jit(layers).lower(args[0])
    assert len(traced) == 1


def test_numpy_arrays_are_operands_too():
    args, options = next(iter(CASES.values())).arguments()
    expected = quantized_decode(*args, **options, implementation="reference")
    got = quantized_decode(*jax.tree.map(np.asarray, args), **options, implementation="reference")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_backend_that_is_named_never_falls_back():
    args, options = CASES["head_dim-80"].arguments()
    with compile_for(Target("gpu", 90)), recording() as choices:
        with pytest.raises(Unsupported, match="head_dim=80 must be 64, 128, 192 or 256"):
            jax.eval_shape(lambda: quantized_decode(*args, **options, implementation="hopper"))
        assert not choices
        jax.eval_shape(lambda: quantized_decode(*args, **options))
    assert choices[0].backend in ("gpu", "blocked")
    assert choices[0].reasons[0] == ("hopper", "head_dim=80 must be 64, 128, 192 or 256.")


ROWS = jax.ShapeDtypeStruct((1, 2, 256, 128), np.float16)
NUMBERS = jax.ShapeDtypeStruct((1,), np.int32)


@pytest.mark.parametrize(
    ("kernel", "args"),
    [
        (prefill, (jax.ShapeDtypeStruct((1, 2, 1, 256, 128), np.float16), ROWS, ROWS, NUMBERS)),
        (low_rank_decode, (jax.ShapeDtypeStruct((1, 2, 4, 128), np.float16), ROWS, ROWS, NUMBERS)),
        (hadamard, (ROWS,)),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_rows_in_float16_are_not_read_on_tpu(kernel, args):
    with compile_for(Target("tpu", 6)), recording() as choices:
        with pytest.raises(Unsupported, match="Mosaic has no float16 vectors"):
            jax.eval_shape(functools.partial(kernel, implementation="tpu"), *args)
        jax.eval_shape(kernel, *args)
    assert choices[0].backend != "tpu"
    assert choices[0].reasons[0] == ("tpu", "Mosaic has no float16 vectors; rows in bfloat16 or float32 are read.")
