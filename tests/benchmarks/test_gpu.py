"""Benchmarks run by hand must still run: their steps at tiny shapes."""

import json

import pytest

from benchmarks.gpu import correct, steps
from benchmarks.gpu.__main__ import _usable
from benchmarks.record import Record
from pallas_kernels import quantized_decode
from pallas_kernels.hadamard import cases as hadamard_cases
from pallas_kernels.quantize_pack import cases as quantize_cases
from pallas_kernels.quantize_pack import quantize_pack
from pallas_kernels.quantized_decode.cases import token


def test_operations_that_have_a_hopper_kernel_are_checked_first():
    found = correct.operations()
    hopper = [name for name in found if correct._exists(name, "hopper")]
    assert found[: len(hopper)] == hopper == ["quantized_decode", "quantize_pack", "prefill"]
    assert found[-2:] == ["codebook_decode", "homomorphic_decode"]
    assert len(found) == len(set(found)) == 9


def test_a_case_has_one_reference_and_a_row_for_each_backend_there_is(tmp_path, monkeypatch):
    called_with = []

    def counted(*args, implementation, **options):
        called_with.append(implementation)
        return definition(*args, implementation=implementation, **options)

    definition = quantized_decode.quantized_decode
    monkeypatch.setattr(quantized_decode, "quantized_decode", counted)
    monkeypatch.setattr(correct, "operations", lambda: ["quantized_decode", "low_rank_decode"])
    record = Record(tmp_path / "gpu.json", 600.0)
    assert correct.check(record, ("hopper", "blocked"), 1, workers=1, share=0.5)
    rows = [(row["operation"], row["backend"], row["outcome"]) for row in record.content["correctness"]]
    assert rows == [
        ("quantized_decode", "hopper", "unsupported"),
        ("quantized_decode", "blocked", "right"),
        ("low_rank_decode", "blocked", "right"),
    ]
    assert called_with == ["reference", "hopper", "blocked"]


@pytest.mark.parametrize(("operation", "outcome_of_a_tie"), [("hadamard", "right"), ("quantize_pack", "wrong")])
def test_words_are_right_bit_for_bit_and_where_they_are_rotated_up_to_ties(operation, outcome_of_a_tie):
    case = {"hadamard": hadamard_cases.Case(fmt=token(4)), "quantize_pack": quantize_cases.Case(token(4))}[operation]
    want = quantize_pack(*case.arguments()[0])

    def outcome(change):
        got = want._replace(codes=want.codes.at[0, 0, 0, 0].set(change(want.codes[0, 0, 0, 0])))
        return correct.judged(operation, case, "gpu", got, want)["outcome"]

    assert outcome(lambda word: word) == "right"
    assert outcome(lambda word: word ^ 1) == outcome_of_a_tie
    assert outcome(lambda word: ~word) == "wrong"


def test_backends_that_decode_attention_wrongly_are_not_timed(tmp_path):
    record = Record(tmp_path / "gpu.json", 600.0)
    for backend, operation, outcome in (
        ("hopper", "quantized_decode", "unsupported"), ("hopper", "quantized_decode", "not reached"),
        ("gpu", "quantized_decode", "wrong"), ("gpu", "quantized_decode", "right"),
        ("blocked", "quantized_decode", "failed"), ("blocked", "prefill", "right"),
    ):  # fmt: skip
        record.add("correctness", operation=operation, backend=backend, outcome=outcome)
    assert _usable(record, ("hopper", "gpu", "blocked", "tpu")) == ("hopper", "gpu")


@pytest.mark.slow
def test_the_rehearsal_of_decode_steps_fills_caches_and_times_every_method(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "METHODS", ("full", "int4"))
    record = Record(tmp_path / "gpu.json", 600.0)
    steps.measure(record, layers=2, rounds=3, workers=1, tiny=True)
    full, int4 = json.loads(record.path.read_text())["decode_steps"]
    assert (full["method"], int4["method"]) == ("full", "int4")
    assert (
        full["cache_bytes"] > 2 * 2 * 2 * 512 * 2 * 128 * 4
    )  # 2 layers, K and V, 2 rows of 512 tokens, 2 heads of 128
    assert full["cache_bytes"] > 3 * int4["cache_bytes"]
    assert int4["times_faster_than_full"] == pytest.approx(full["median_s"] / int4["median_s"])


def test_decode_steps_do_not_begin_late(tmp_path):
    record = Record(tmp_path / "gpu.json", steps.SECONDS - 1)
    steps.measure(record, layers=2, rounds=3, workers=1, tiny=True)
    assert record.content["cut"] == [{"decode_steps": "not reached"}]
