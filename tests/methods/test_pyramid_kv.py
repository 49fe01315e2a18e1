"""Faithfulness of PyramidKV: budgets by layer."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.budgets import pyramid
from tests.laws.parts import prefill, qkv


def kvpress_budgets(prompt, ratio, layers, *, window=64, beta=20):
    """The schedule of kvpress; None where it gives all layers the same."""
    base = prompt * (1 - ratio)
    low = base / beta
    high = 2 * base - low
    if high >= prompt - window:
        high = prompt - window
        low = 2 * base - high
    if not prompt >= high >= low >= window:
        return None
    return [round(high - i * (high - low) / (layers - 1)) for i in range(layers)]


def of_prompt(spec):
    """Tokens of the prompt that a layer keeps."""
    return spec.window + spec.policy.num_sinks + spec.rungs[0].capacity - spec.rungs[0].reserve


@pytest.mark.parametrize(("prompt", "ratio"), [(4096, 0.6), (8192, 0.75), (8192, 0.8), (2000, 0.3), (4000, 0.5625)])
@pytest.mark.parametrize("layers", [2, 30, 32])
def test_budgets_are_those_of_kvpress(prompt, ratio, layers):
    expected = kvpress_budgets(prompt, ratio, layers)
    layout = kvc.Layout(num_layers=layers, num_kv_heads=1, head_dim=64)
    specs = kvc.parse(f"pyramid_kv:budget={1 - ratio}").plan(layout, max_len=prompt + 100, prompt_len=prompt).specs
    sizes = [of_prompt(spec) for spec in specs]
    if expected[-1] > 65:
        np.testing.assert_allclose(sizes, expected, atol=1)  # whole tokens of the mean come first here
    base = int(prompt * (1 - ratio))
    assert sum(sizes) == layers * base
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= 65
    assert sizes[0] <= prompt - 64 or ratio < 0.5


@pytest.mark.parametrize("budget", [700, 1000, 1024, 1100, 2048])
def test_budgets_in_tokens_lose_nothing_of_shorter_prompts(budget):
    """And keep within the prompt where they are smaller; short rows have the layers' budgets of the longest."""
    layout = kvc.Layout(num_layers=30, num_kv_heads=1, head_dim=64)
    plan = kvc.parse(f"pyramid_kv:budget={budget}").plan(layout, max_len=4096, prompt_len=1024)
    sizes = [of_prompt(spec) for spec in plan.specs]
    assert sum(sizes) == 30 * budget
    assert sizes[0] <= max(1024 - 64, budget)
    assert sizes[-1] == pytest.approx(min(2 * budget - (1024 - 64), budget), abs=1)
    (short,) = plan.row_plans([300])
    assert [of_prompt(spec) for spec in short.specs] == sizes


@pytest.mark.parametrize("store", ["int4", "kivi:bits=4"])
@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_compositions_leave_the_last_layers_a_block(budget, store):
    layout = kvc.Layout(num_layers=30, num_kv_heads=1, head_dim=64)
    specs = kvc.parse(f"pyramid_kv:budget={budget}+{store}").plan(layout, max_len=1280, prompt_len=1024).specs
    for spec in specs:
        assert spec.rungs[-1].capacity - spec.rungs[-1].reserve >= spec.block_size
    kept, mean = [of_prompt(spec) for spec in specs], budget * 1024
    assert kept == sorted(kept, reverse=True)
    assert layout.num_layers * (mean - 2 * specs[0].block_size) <= sum(kept) <= layout.num_layers * mean


def test_schedule_has_the_closed_form():
    assert pyramid(32 * 120, 32, ratio=39.0) == tuple(round(234 - i * 228 / 31) for i in range(32))
    assert sum(pyramid(1000, 7)) == 1000
    assert pyramid(10, 1) == (10,)
    assert pyramid(12, 3, ratio=1.0) == (4, 4, 4)
    assert pyramid(14, 3, ratio=1.0) == (5, 5, 4)


@pytest.mark.parametrize(
    ("arguments", "words"), [((10, 20, 4.0), "leaves a layer without a token"), ((10, 2, 0.5), "ratio=0.5 at least 1")]
)
def test_impossible_schedules_are_refused(arguments, words):
    total, layers, ratio = arguments
    with pytest.raises(ValueError, match=words):
        pyramid(total, layers, ratio=ratio)


def test_ragged_rows_have_the_budgets_of_each_alone():
    lengths = [400, 150, 60, 3]
    layout = kvc.Layout(num_layers=3, num_kv_heads=2, head_dim=64)
    method = kvc.parse("pyramid_kv:budget=0.5,window=16")
    plan = method.plan(layout, max_len=440, prompt_len=400)
    caches = plan.init(batch=4, dtype=jnp.float32, prompt_lens=lengths)
    q, k, v = qkv(0, 4, 400)
    for layer in (0, 2):
        _, cache = prefill(caches[layer], q, k, v, jnp.array(lengths))
        alone = [method.plan(layout, max_len=440, prompt_len=n).specs[layer] for n in lengths]
        np.testing.assert_array_equal(
            kvc.live_tokens(cache), [min(of_prompt(s), n) for s, n in zip(alone, lengths, strict=True)]
        )


def test_small_budgets_are_refused():
    layout = kvc.Layout(num_layers=3, num_kv_heads=2, head_dim=64)
    with pytest.raises(ValueError, match=r"budget=64 tokens must exceed num_sinks=0 \+ window=64"):
        kvc.parse("pyramid_kv:budget=64").plan(layout, max_len=400, prompt_len=300)
    with pytest.raises(ValueError, match=r"beta=0\.5 must be at least 1"):
        kvc.parse("pyramid_kv:beta=0.5").plan(layout, max_len=400, prompt_len=300)
