"""Calls of kernels from a program."""

import jax

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
