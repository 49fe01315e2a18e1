"""Faithfulness of PyramidInfer: which tokens each layer sees and computes, and how later ones are thinned."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.budgets import nested
from kvcomp_jax.cache import window_pos
from kvcomp_jax.prompt import as_seen
from kvcomp_jax.tiers import tier_pos
from models.generate import _open, _read_chunk
from models.generate import prefill as prefill_model
from tests.laws.parts import decode, make, qkv, settle
from tests.laws.parts import prefill as prefill_layer
from tests.methods.brute import causal_probs, held, output, probs_where, seen_by
from tests.models import golden

TEXT = "pyramid_infer:decay=0.6,min_context=8"


def read(lm, lengths, text=TEXT, later=8):
    """Caches after prompts of random ids."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, lm.config.vocab_size, n).tolist() for n in lengths]
    plan = kvc.parse(text).plan(lm.config.layout, max_len=max(lengths) + later, prompt_len=max(lengths))
    caches = plan.init(batch=len(rows), dtype=lm.dtype, prompt_lens=lengths)
    logits, caches, *_ = prefill_model(lm, rows, caches)
    return rows, logits, caches


def test_without_decay_nothing_differs_from_the_full_cache():
    lm, _ = golden.load("llama")
    _, logits, caches = read(lm, [70, 41], "pyramid_infer:decay=1.0")
    _, expected, full = read(lm, [70, 41], "full")
    chex.assert_trees_all_close(logits, expected, atol=2e-4)
    for cache, other in zip(caches, full, strict=True):
        assert held(cache) == held(other)


def test_sets_are_nested_and_hold_tail_and_first_tokens():
    lm, _ = golden.load("llama")
    lengths = [90, 50, 7]
    _, _, caches = read(lm, lengths)
    for row, n in enumerate(lengths):
        sets = [held(cache, row) for cache in caches]
        assert all(heads == [heads[0]] * len(heads) for heads in sets)  # one set for all heads
        sets = [heads[0] for heads in sets]
        assert sets[0] == set(range(n))
        for before, after in itertools.pairwise(sets):
            assert after <= before
        always = {*range(min(4, n)), *range(n - 1 - int(0.2 * n), n)}
        assert all(always <= kept for kept in sets)
        if n > 40:
            assert len(sets[-1]) < len(sets[-2]) == n  # the first layer hands on everything
        np.testing.assert_array_equal([cache.length[row] for cache in caches], n)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("least", [0, 64, 300])
def test_counts_follow_the_closed_form(interval, least, schedule):
    rho, layers, tokens = 0.9, 32, 800
    expected, now = [], tokens
    for layer in range(layers):
        expected.append(now)
        share = (1 - rho) * (math.cos(math.pi * layer / layers) + 1) / 2 + rho
        if schedule == "linear":
            share = 1 - (1 - rho) * layer / layers
        passed = int(now * share)
        if layer % interval == 0 and share < 1 and passed > least and now > least:
            now = passed
    assert nested(tokens, layers, decay=rho, interval=interval, schedule=schedule, least=least) == tuple(expected)
    assert (min(expected) >= least) or not least


def test_defaults_leave_what_the_paper_says():
    """8B: 20.0 % of the context survives the last layer; a mean of 76.7 % of the tokens is kept."""
    context, tail = 26214, 6554
    seen = nested(context, 32, decay=0.9)
    mean = np.mean([tail + n for n in seen]) / 32768
    assert mean == pytest.approx(0.767, abs=0.005)
    layout = kvc.Layout(num_layers=32, num_kv_heads=8, head_dim=128)
    specs = kvc.parse("pyramid_infer").plan(layout, max_len=32768, prompt_len=32768).specs
    assert [spec.prompt_tokens for spec in specs] == [tail + n for n in nested(32768 - tail, 32, decay=0.9)]


def test_what_is_handed_on_has_the_highest_scores_of_the_definition():
    tokens, tail, first = 60, 13, 4
    q, k, v = qkv(0, 1, tokens, heads=(6, 2))
    layout = kvc.Layout(num_layers=3, num_kv_heads=2, head_dim=64)
    plan = kvc.parse("pyramid_infer:decay=0.3,min_context=8").plan(layout, max_len=64, prompt_len=60)
    _, before, after = plan.init(batch=1, dtype=jnp.float32)
    seen = kvc.open_prompt(before, 0)
    pad = [jnp.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0))) for x in (q, k, v)]
    _, seen = kvc.attend(seen, *pad, jnp.array([tokens]))
    policy = before.spec.policy
    score = np.asarray(policy.worth_passing(as_seen(seen, before, seen.staged), jnp.array([tail])))[0]
    probs = causal_probs(q[0], k[0]).reshape(-1, tokens, tokens).mean(0)[-tail:]
    expected = (probs * np.linspace(1.0, 1.2, tail)[:, None]).mean(0)
    np.testing.assert_allclose(score[first : tokens - tail], expected[first : tokens - tail], rtol=1e-4)
    assert np.isposinf(score[:first]).all()
    assert np.isposinf(score[tokens - tail : tokens]).all()
    assert np.isneginf(score[tokens:]).all()
    room = after.spec.prompt_tokens
    assert room == 13 + int(47 * 0.825)
    following = kvc.open_prompt(after, 0)
    assert kvc.hands_on(seen, following)
    index, num = kvc.hand_on(seen, following)
    best = np.argsort(-score[:tokens], kind="stable")[:room]
    assert int(num[0]) == room
    assert sorted(best.tolist()) == np.asarray(index)[0].tolist()


def test_deeper_layers_compute_fewer_tokens():
    """What a layer does not see it does not compute: operations fall as the sums of tokens do."""
    lm, _ = golden.load("llama")

    def operations(text):
        plan = kvc.parse(text).plan(lm.config.layout, max_len=256, prompt_len=256)
        caches = jax.eval_shape(lambda: plan.init(batch=1, dtype=lm.dtype))
        prompts = jax.eval_shape(lambda cs: _open(lm, cs, 256 if text == "full" else 0)[0], caches)
        shapes = (jax.ShapeDtypeStruct((1, 256), jnp.int32), *(jax.ShapeDtypeStruct((1,), jnp.int32),) * 2)
        logits = jax.ShapeDtypeStruct((1, lm.config.vocab_size), jnp.float32)
        return _read_chunk.lower(lm.model, lm.params, *shapes, logits, prompts).as_text()

    full, fewer = operations("full"), operations("pyramid_infer:decay=0.6,min_context=8")
    ffn = lm.config.ffn_dim
    assert full.count(f"tensor<1x256x{ffn}xf32>") > fewer.count(f"tensor<1x256x{ffn}xf32>")
    last = kvc.parse("pyramid_infer:decay=0.6,min_context=8").plan(lm.config.layout, max_len=256, prompt_len=256)
    assert f"tensor<1x{last.specs[-1].prompt_tokens}x{ffn}xf32>" in fewer


def keys_at(cache):
    """Cached keys [K, D] of one row by text position."""
    sets = [(window_pos(cache), cache.window.k), *((tier_pos(t, 0), t.k) for t in cache.tiers)]
    return {
        int(p): np.asarray(k[0, :, slot])
        for pos, k in sets
        for slot, p in enumerate(np.asarray(pos)[0, 0].tolist())
        if p >= 0
    }


def test_positions_travel_with_tokens():
    """The last of three layers is the first that is handed a part: its keys are those of the full model, turned so."""
    lm, _ = golden.load("llama")
    _, _, caches = read(lm, [90])
    _, _, full = read(lm, [90], "full")
    mine, whole = keys_at(caches[-1]), keys_at(full[-1])
    assert set(mine) < set(whole)
    for pos, k in mine.items():
        np.testing.assert_allclose(k, whole[pos], atol=1e-4)


@pytest.mark.slow
def test_rows_keep_what_each_keeps_alone():
    lm, _ = golden.load("llama")
    lengths = [90, 50]
    rows, logits, caches = read(lm, lengths)
    for row, n in enumerate(lengths):
        plan = kvc.parse(TEXT).plan(lm.config.layout, max_len=n + 8, prompt_len=n)
        alone_logits, alone, *_ = prefill_model(lm, [rows[row]], plan.init(batch=1, dtype=lm.dtype, prompt_lens=[n]))
        chex.assert_trees_all_close(logits[row], alone_logits[0], atol=1e-4)
        for one, many in zip(alone, caches, strict=True):
            assert held(one) == held(many, row)


def test_later_tokens_are_thinned_by_the_block_and_the_prompts_never():
    prompt, steps, block, kept = 30, 70, 8, 3
    text = f"pyramid_infer:recent=0.3,thin={kept / block + 0.01},thin_decay=1.0,exceed={block}"
    q, k, v = qkv(4, 1, prompt + steps, heads=(6, 2))
    cache = make(text, batch=1, num_kv_heads=2, max_len=prompt + steps, prompt_lens=[prompt])
    assert cache.spec.window == 10
    _, cache = prefill_layer(cache, *(x[:, :prompt] for x in (q, k, v)))
    sets, mass = set(range(prompt)), np.zeros((prompt + steps, prompt + steps))
    for t in range(prompt, prompt + steps):
        sets.add(t)
        p = probs_where(q[0, t : t + 1], k[0], seen_by([sets], prompt + steps))
        mass[t] = p.mean((0, 1))[0]
        out, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        chex.assert_trees_all_close(out[0], jnp.asarray(output(p, v[0]), jnp.float32), atol=1e-5)
        cache = settle(cache)
        end = t + 1 - 10  # the window's first token
        start = (prompt - 10) // block * block
        if end > start and (end - start) % block == 0:
            leaving = np.arange(end - block, end)
            later = leaving[leaving >= prompt]
            ramp = 1 + 0.2 * (np.arange(prompt + steps) - end) / (t - end)
            score = {int(i): (mass[:, i] * ramp).sum() for i in later}
            room = max(kept - (block - len(later)), 0)
            best = sorted(later.tolist(), key=lambda i: -score[i])[:room]
            sets -= set(later.tolist()) - set(best)
        assert held(cache) == [sets] * 2
    assert set(range(prompt)) <= sets
    assert len(sets) < prompt + steps - 20


@pytest.mark.slow
def test_what_is_handed_on_can_be_quantised():
    """Units of codes cost a layer fewer tokens than a unit and a block; whatever comes later is kept."""
    lm, _ = golden.load("llama")
    text = "pyramid_infer:decay=0.3,min_context=8,exceed=8"
    _, _, exact = read(lm, [150], text)
    _, logits, caches = read(lm, [150], f"{text}+int4:group_size=16")
    for cache, plain in zip(caches, exact, strict=True):
        assert cache.spec.keep == 1.0
        lost = len(held(plain)[0]) - len(held(cache)[0])
        assert 0 <= lost < cache.spec.block_size + cache.tiers[0].unit
        np.testing.assert_array_equal(cache.length, 150)
    assert bool(jnp.isfinite(logits).all())


def test_kept_shares_of_blocks_fall_with_depth():
    layout = kvc.Layout(num_layers=32, num_kv_heads=2, head_dim=64)
    specs = kvc.parse("pyramid_infer").plan(layout, max_len=1500, prompt_len=1000).specs
    kept = [round(spec.keep * spec.block_size) for spec in specs]
    assert kept[:4] == [14] * 4
    assert kept[15] == 8
    assert kept[-4:] == [1] * 4
    assert kept == sorted(kept, reverse=True)


def test_bytes_are_those_of_the_tokens_kept():
    lm, _ = golden.load("llama")
    lengths = [90, 50]
    _, _, caches = read(lm, lengths)
    plan = kvc.parse(TEXT).plan(lm.config.layout, max_len=98, prompt_len=90)
    assert kvc.forecast(plan, lengths, lm.dtype) == kvc.nbytes(caches)
    seen = [len(held(cache)[0]) for cache in caches]
    assert seen == [spec.prompt_tokens for spec in plan.specs]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pyramid_infer:decay=0.0", r"decay=0.0 must be in \(0, 1\]"),
        ("pyramid_infer:schedule=square", "schedule='square' must be 'cosine' or 'linear'"),
        ("pyramid_infer:thin=0.0", r"thin in \(0, 1\]|thin=0.0 in \(0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=100, head_dim=64, prompt_len=80)


def test_it_needs_the_prompts_length_and_whole_prompts():
    with pytest.raises(ValueError, match="pass prompt_len"):
        kvc.parse("pyramid_infer").spec(max_len=100, head_dim=64)
    layout = kvc.Layout(num_layers=2, num_kv_heads=2, head_dim=64, sliding_windows=(None, 32))
    with pytest.raises(ValueError, match="sliding windows cannot be handed"):
        kvc.parse("pyramid_infer").plan(layout, max_len=100, prompt_len=80)
