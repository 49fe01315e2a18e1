"""What `make aot` fails for, and what it finds in the text of a compiled program."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot.__main__ import Config, compact, failure, main
from benchmarks.aot.compile_group import decoded_arrays, vmem
from benchmarks.aot.programs import OPERATIONS, programs
from benchmarks.aot.targets import DEVICES
from pallas_kernels.quantized_decode.cases import CASES

FINE = {
    "device": "h200", "expects_kernel": True, "kernels": 1, "decoded": [], "reads_codes": False, "argument_bytes": 1000,
    "temporary_bytes": 500, "registers": 168, "spills": 0, "shared_bytes": 4096,
}  # fmt: skip
WITHOUT_FIGURES = {key: FINE[key] for key in FINE if key not in ("registers", "spills", "shared_bytes")}
REFUSED = {"device": "h200", "expects_kernel": True, "refused": "head_dim=80 is too odd."}
LOST = {"device": "v5e", "expects_kernel": True, "error": "the compiler died: out of memory"}


@pytest.mark.parametrize(
    "record",
    [
        FINE,
        {**FINE, "temporary_bytes": 2000, "reads_codes": True},  # TPUs count packed caches that are fetched early
        {**WITHOUT_FIGURES, "device": "v5e"},
        {**WITHOUT_FIGURES, "expects_kernel": False, "kernels": 0, "decoded": ["f32[8,64]"]},  # XLA's own attention
    ],
)
def test_what_is_fine_does_not_fail(record):
    assert failure(record) == ""


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (LOST, "the compiler died: out of memory"),
        ({**FINE, "kernels": 0}, "no kernel of ours is in it."),
        ({**FINE, "decoded": ["f32[8,64]"]}, "it stores f32[8,64], as large as a decompressed cache."),
        ({**FINE, "temporary_bytes": 501}, "501 temporary bytes for 1000 of arguments."),
        ({**FINE, "spills": 8}, "8 bytes of spilled registers."),
        (WITHOUT_FIGURES, "no figures of its kernel."),
        (REFUSED, "refused: head_dim=80 is too odd."),
    ],
)
def test_what_is_not_fails_and_says_why(record, reason):
    assert failure(record) == reason


def test_tiny_cases_may_be_refused_and_have_large_temporaries_and_nothing_else():
    assert failure(REFUSED, tiny=True) == ""
    assert failure({**FINE, "temporary_bytes": 5000}, tiny=True) == ""
    assert failure(LOST, tiny=True) == failure(LOST)
    assert failure({**FINE, "spills": 8}, tiny=True) == "8 bytes of spilled registers."
    assert failure({**FINE, "kernels": 0}, tiny=True) == "no kernel of ours is in it."


def test_cases_are_those_that_interpreters_run():
    found = programs(DEVICES["h200"], cases=True)
    of_attention = [program.name for program in found if program.group == "quantized_decode / hopper"]
    assert of_attention == list(CASES)
    assert not any(program.group.startswith("decode step") for program in found)
    assert {program.group.split(" / ")[0] for program in found} == set(OPERATIONS)


def test_results_of_cases_say_what_became_of_each():
    records = [
        {**FINE, "group": "hadamard / gpu", "name": "dim-1", "failed": ""},
        {**REFUSED, "group": "prefill / hopper", "name": "one", "failed": ""},
        {**LOST, "group": "prefill / tpu", "name": "few", "failed": LOST["error"]},
    ]
    rows = json.loads(compact(records))["records"]
    assert [row["outcome"] for row in rows] == [
        "compiled", "refused: head_dim=80 is too odd.", "failed: the compiler died: out of memory"
    ]  # fmt: skip
    assert rows[0] == {
        "operation": "hadamard", "case": "dim-1", "device": "h200", "backend": "gpu", "outcome": "compiled",
        "spills": 0, "registers": 168, "shared_bytes": 4096, "temporary_bytes": 500,
    }  # fmt: skip


STORED = """HloModule jit_call

%fused_computation (param_0: u32[2,8,128]) -> f32[2,64,128] {
  %param_0 = u32[2,8,128]{2,1,0} parameter(0)
  ROOT %convert.1 = f32[2,64,128]{2,1,0} convert(%param_0)
}

ENTRY %main (Arg_0: u32[2,8,128], Arg_1: bf16[2,64,128]) -> f32[2,64,128] {
  %Arg_0 = u32[2,8,128]{2,1,0} parameter(0)
  %Arg_1 = bf16[2,64,128]{2,1,0} parameter(1)
  %small = f32[2,8]{1,0} constant({...})
  %projected = bf16[2,64,576]{2,1,0} custom-call(%Arg_1), custom_call_target="matmul"
  %turned = bf16[2,128,64]{2,1,0:T(8,128)} bitcast(%Arg_1)
  ROOT %fusion = f32[2,64,128]{2,1,0} fusion(%Arg_0), kind=kLoop, calls=%fused_computation
}
"""
FUSED = STORED.replace("f32[2,64,128]{2,1,0} fusion", "f32[2,128]{1,0} fusion")
SHAPES = (
    jax.ShapeDtypeStruct((2, 8, 128), jnp.uint32),
    jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((128, 576), jnp.bfloat16),  # a weight matrix: what has its axes is an activation
)


def test_a_decoded_cache_is_found_where_it_is_stored():
    assert decoded_arrays(STORED, SHAPES) == ["f32[2,64,128]"]
    assert decoded_arrays(FUSED, SHAPES) == []  # decoded inside a fusion, never stored
    assert decoded_arrays(STORED, SHAPES[:2]) == ["bf16[2,64,576]", "f32[2,64,128]"]  # not what is turned
    assert decoded_arrays(STORED, SHAPES[1:]) == []  # no codes, nothing to decode


def test_vector_memory_is_that_of_the_kernel_with_most():
    def call(*sizes):
        granted = ",".join(f'{{"memory_space":"1","offset":"0","size":"{size}"}}' for size in sizes)
        return f'custom-call(), custom_call_target="tpu_custom_call", "used_scoped_memory_configs":[{granted}]'

    assert vmem(f"{call(1000, 24)}\n{call(512)}") == {"vmem_bytes": 1024}
    assert vmem(call(512).replace('"memory_space":"1"', '"memory_space":"3"')) == {"vmem_bytes": 0}
    assert vmem('custom_call_target="matmul"') == {}
    with pytest.raises(ValueError, match="does not say how much vector memory"):
        vmem('custom_call_target="tpu_custom_call"')


def test_a_selection_of_nothing_is_an_error_and_writes_nothing(tmp_path):
    out = tmp_path / "aot.json"
    with pytest.raises(ValueError, match="only='no such kernel' is found in no program"):
        main(Config(devices="v5e", only="no such kernel", out=out))
    assert not out.exists()
