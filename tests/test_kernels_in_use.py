"""A cache says which kernel reads it, for this machine and for others, and why not a better one."""

import re

import jax
import jax.numpy as jnp
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.codecs import Affine, Identity
from kvcomp_jax.tiers import attend_by_blocks, attend_tier
from pallas_kernels.dispatch import Target, compile_for
from tests.laws.parts import low_rank, make, qkv


def test_quantised_rungs_get_the_fused_read():
    (rung,) = kvc.kernels_in_use(make("int4", batch=2, num_kv_heads=3, max_len=256), num_heads=9)
    assert rung.codecs == ("Affine", "Affine")
    assert rung.operation == "quantized_decode"
    first, second = kvc.kernels_in_use(make("kivi", batch=1, num_kv_heads=2, max_len=512))
    assert first.operation == "dot and mix"
    assert "no fused read for keys of Affine and values of Identity" in first.reasons[0][1]
    assert second.operation == "quantized_decode"


def test_what_a_policy_asks_for_is_the_reason():
    (rung,) = kvc.kernels_in_use(make("h2o:budget=64+int4", batch=1, num_kv_heads=2, max_len=256))
    assert rung.backend == "xla"
    assert "HeavyHitter needs each token's probability" in rung.reasons[0][1]


@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_hopper_gpu_gets_its_kernel_or_the_reason_why_not(head_dim):
    layout = kvc.Layout(num_layers=1, num_kv_heads=2, head_dim=head_dim)
    (cache,) = kvc.parse("int4").plan(layout, max_len=256, prompt_len=256).init(batch=1, dtype=jnp.float32)
    with compile_for(Target("gpu", 90)):
        (rung,) = kvc.kernels_in_use(cache, num_heads=4)
    if head_dim == 64:
        assert (rung.operation, rung.backend, rung.reasons) == ("quantized_decode", "hopper", ())
    else:
        assert rung.backend != "hopper"
        assert rung.reasons[0] == ("hopper", "head_dim=80 must be 64, 128, 192 or 256.")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_decode_step_traced_for_a_target_takes_its_kernel(platform):
    cache = make("int4", batch=1, num_kv_heads=2, max_len=256)
    with compile_for(Target(platform)):
        program = str(jax.make_jaxpr(kvc.decode)(cache, *qkv(0, 1, 1)))
        (rung,) = kvc.kernels_in_use(cache, num_heads=4)
    assert ("pallas_call" in program) == (rung.backend == "tpu")


def test_reading_a_prompt_takes_the_kernels_of_prefill_and_quantise():
    cache = make("int4", batch=1, num_kv_heads=2, max_len=256)
    assert {"prefill", "quantize_pack"} <= kernels(kvc.prefill, cache, *qkv(0, 1, 256))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("int4", {"quantized_decode"}),
        ("kivi", {"quantized_decode"}),
        ("quarot", {"hadamard", "quantized_decode"}),
        ("hack", {"homomorphic_decode"}),
        ("turboquant:bits=3", {"hadamard", "codebook_decode"}),
        ("kvquant:calibration=kvquant_3.safetensors", {"codebook_decode"}),
        ("zeroc:k_rank=32,v_rank=48,calibration=zeroc.safetensors", {"low_rank_decode"}),
        ("zeroc:rank=32,bits=4,calibration=zeroc.safetensors", {"low_rank_decode"}),
        ("quest:budget=64,full_layers=0", {"low_rank_decode"}),  # what gather_decode reads its copied pages with
    ],
)
def test_a_decode_step_on_tpu_holds_these_kernels(method, expected):
    assert kernels(kvc.decode, make(method, batch=1, num_kv_heads=2, max_len=256), *qkv(0, 1, 1)) == expected


@pytest.mark.parametrize("method", ["int4", "kivi", "quarot"])
def test_settling_on_tpu_packs_with_a_kernel(method):  # for quarot it rotates as well
    assert kernels(kvc.settle, make(method, batch=1, num_kv_heads=2, max_len=256)) == {"quantize_pack"}


def kernels(function, *args):
    """Names of the Pallas kernels in a program for TPU."""
    with compile_for(Target("tpu")):
        program = str(jax.make_jaxpr(function)(*args))
    return set(re.findall(r"pallas_call\[.*?\n *name=(\w+)", program, re.DOTALL))


def test_backends_to_do_without_are_passed_over_and_say_so(monkeypatch):
    monkeypatch.setenv("KVCOMP_WITHOUT", "cpu,blocked")
    (rung,) = kvc.kernels_in_use(make("int4", batch=1, num_kv_heads=2, max_len=256))
    assert rung.backend == "reference"
    assert rung.reasons == (("cpu", "KVCOMP_WITHOUT names it."), ("blocked", "KVCOMP_WITHOUT names it."))
    monkeypatch.setenv("KVCOMP_WITHOUT", "numba")
    with pytest.raises(ValueError, match="KVCOMP_WITHOUT=numba names 'numba'; known: blocked, cpu"):
        kvc.kernels_in_use(make("int4", batch=1, num_kv_heads=2, max_len=256))


@pytest.mark.slow
def test_numba_reads_a_quantised_cache_on_cpu_in_a_jitted_step(monkeypatch):
    monkeypatch.setenv("KVCOMP_WITHOUT", "")
    cache = make("int4", batch=2, num_kv_heads=3, max_len=256)
    args = qkv(0, 2, 1, (9, 3))
    (rung,) = kvc.kernels_in_use(cache, num_heads=9)
    assert rung.backend == "cpu"
    assert "kvcomp_quantized_decode" in jax.jit(kvc.decode).lower(cache, *args).as_text()


@pytest.mark.parametrize("whole", ["k", "v"])
@pytest.mark.parametrize("inner", [Identity(), Affine(bits=4, axis="channel", group_size=16)], ids=repr)
def test_one_side_of_a_low_rank_beside_all_channels_is_read_by_its_kernel(whole, inner):
    codecs = {"k": low_rank(inner, 32), "v": low_rank(inner, 48)} | {whole: inner}
    spec = kvc.LayerSpec(rungs=(kvc.Rung(**codecs, capacity=64),), block_size=16)
    cache = kvc.init(spec, batch=1, num_kv_heads=2, head_dim=64, dtype=jnp.float32)
    q, k, v = qkv(3, 1, 64)
    _, cache = kvc.prefill(cache, q, k, v, jnp.array([48]))
    (rung,) = kvc.kernels_in_use(cache, num_heads=4)
    assert rung.operation == "low_rank_decode"
    queries = kvc.read.make_queries(cache, q[:, -1:], None, None, None)
    fused, plain = (kvc.finalize(attend(queries, cache.tiers[0], 0)) for attend in (attend_tier, attend_by_blocks))
    assert jnp.allclose(fused, plain, atol=1e-5)
