"""Faithfulness of Scissorhands: when, how many and which tokens go, and what is remembered of those that stay."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import decode, make, prefill, qkv, settle
from tests.methods.brute import causal_probs, held, output, probs_where, seen_by

BUDGET, RECENT, DROP, HISTORY = 40, 6, 12, 20
TEXT = f"scissorhands:budget={BUDGET},recent={RECENT},drop={DROP},history={HISTORY}"


def times_low(words):
    return np.unpackbits(np.asarray(words).view(np.uint8), axis=-1).sum(-1)


def run(prompt, steps, text=TEXT, seed=0):
    """Yield (t, out, sets before the step, cache after append, cache after settling) of each step."""
    q, k, v = qkv(seed, 1, prompt + steps)
    cache = make(text, batch=1, num_kv_heads=2, max_len=prompt + steps, prompt_lens=[prompt])
    _, cache = prefill(cache, *(x[:, :prompt] for x in (q, k, v)))
    for t in range(prompt, prompt + steps):
        before = held(cache)
        out, appended = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        cache = settle(appended)
        yield t, out, before, appended, cache


@pytest.mark.parametrize("prompt", [100, 15], ids="prompt={}".format)
def test_events_drop_exactly_so_many_and_never_the_recent(prompt):
    events = []
    for t, _, _, appended, cache in run(prompt, 60):
        before, after = held(appended), held(cache)
        assert all(len(head) <= BUDGET for head in before)
        assert all(set(range(t + 1 - RECENT, t + 1)) <= head for head in after)
        dropped = [len(x) - len(y) for x, y in zip(before, after, strict=True)]
        assert dropped in ([0, 0], [DROP, DROP])
        assert (dropped != [0, 0]) == (len(before[0]) == BUDGET)
        events += [t] if dropped[0] else []
    assert len(events) >= 3
    assert set(np.diff(events)) == {DROP}


def test_a_long_prompt_leaves_room_at_once():
    _, _, before, _, _ = next(run(100, 1))
    assert [len(head) for head in before] == [BUDGET - DROP] * 2


@pytest.mark.parametrize("history", [HISTORY, 40], ids="history={}".format)  # a word of bits, and more
def test_counts_equal_a_recount_of_the_last_rows(history):
    """From attention over what each step really saw; the prompt's last queries saw everything before them."""
    prompt, steps = 60, 50
    text = TEXT.replace(f"history={HISTORY}", f"history={history}")
    q, k, _ = qkv(0, 1, prompt + steps)
    rows = np.zeros((prompt + steps, 2, prompt + steps), bool)  # low[t, head, token]
    probs = causal_probs(q[0, :prompt], k[0, :prompt]).mean(1)
    for t in range(prompt):
        rows[t, :, : t + 1] = probs[:, t, : t + 1] < 1 / (t + 1)
    for t, _, before, appended, cache in run(prompt, steps, text):
        keep = seen_by([head | {t} for head in before], prompt + steps)
        alpha = probs_where(q[0, t : t + 1], k[0], keep).mean(1)[:, 0]
        rows[t] = keep[:, 0] & (alpha < 1 / keep.sum(-1))
        expected = rows[max(t + 1 - history, 0) : t + 1].sum(0)
        tier = appended.tiers[0]
        for head in range(2):
            live = np.asarray(tier.pos[0, head]) >= 0
            at = np.asarray(tier.pos[0, head])[live]
            np.testing.assert_array_equal(times_low(tier.stat.low[0, head])[live], expected[head, at])
        del cache


def test_the_lowest_go_by_count_then_by_mean():
    """Every event drops those with the largest counts; equal counts are cut by mean attention."""
    seen = 0
    for _, _, _, appended, cache in run(60, 50):
        before, after = held(appended), held(cache)
        if len(before[0]) == len(after[0]):
            continue
        tier = appended.tiers[0]
        for head in range(2):
            live = np.asarray(tier.pos[0, head]) >= 0
            at = np.asarray(tier.pos[0, head])[live]
            low = times_low(tier.stat.low[0, head])[live]
            mean = np.asarray(tier.stat.mean[0, head])[live]
            gone = np.isin(at, sorted(before[head] - after[head]))
            assert low[gone].min() >= low[~gone].max()
            level = low[gone].min()
            if (low[~gone] == level).any():
                assert mean[gone & (low == level)].max() <= mean[~gone & (low == level)].min() * 1.002
                seen += 1
    assert seen


def test_mean_attention_of_young_tokens_is_exact():
    prompt, steps = 30, 15
    q, k, _ = qkv(0, 1, prompt + steps)
    total = np.zeros((2, prompt + steps))
    for t, _, before, appended, _ in run(prompt, steps, TEXT.replace("budget=40", "budget=50")):
        keep = seen_by([head | {t} for head in before], prompt + steps)
        total += probs_where(q[0, t : t + 1], k[0], keep).mean(1)[:, 0]
        tier = appended.tiers[0]
        for head in range(2):
            at = np.asarray(tier.pos[0, head])
            young = at >= prompt
            mean = total[head, at[young]] / (t + 1 - at[young])
            np.testing.assert_allclose(tier.stat.mean[0, head][young], mean, rtol=1e-4)
    assert young.any()


def test_before_the_first_event_nothing_differs_from_full_attention():
    q, k, v = qkv(0, 1, 45)
    whole = kvc.causal_attention(q, k, v)
    for t, out, before, _, _ in run(15, 30):
        if len(before[0]) < t:
            assert t == BUDGET
            break
        chex.assert_trees_all_close(out[0, 0], whole[0, t], atol=1e-5)


def test_the_dropped_weigh_nothing_and_the_rest_is_untouched():
    prompt, steps = 60, 40
    q, k, v = qkv(0, 1, prompt + steps)
    for t, out, before, appended, cache in run(prompt, steps):
        keep = seen_by([head | {t} for head in before], prompt + steps)
        expected = output(probs_where(q[0, t : t + 1], k[0], keep), v[0])
        chex.assert_trees_all_close(out[0], jnp.asarray(expected, jnp.float32), atol=1e-5)
        old, new = appended.tiers[0], cache.tiers[0]
        same = (np.asarray(old.pos) == np.asarray(new.pos)) & (np.asarray(new.pos) >= 0)
        for x, y in ((old.k, new.k), (old.v, new.v)):
            np.testing.assert_array_equal(np.asarray(x)[same], np.asarray(y)[same])
        stay = (np.asarray(new.pos) >= 0) & (np.asarray(old.pos) >= 0)
        assert same[stay].all()


def test_heads_decide_alone():
    q, k, v = qkv(3, 1, 60)
    kept = []
    for scale in (1.0, -2.0):
        cache = make(TEXT, batch=1, num_kv_heads=2, max_len=80, prompt_lens=[60])
        _, cache = prefill(cache, q, jnp.asarray(k).at[:, :, 0].multiply(scale), v)
        kept.append(held(cache))
    assert kept[0][1] == kept[1][1]
    assert kept[0][0] != kept[1][0]


@pytest.mark.parametrize("budget", ["200", "0.5"])
def test_later_layers_get_more_of_the_same_total(budget):
    layout = kvc.Layout(num_layers=7, num_kv_heads=2, head_dim=64)
    specs = kvc.parse(f"scissorhands:budget={budget}").plan(layout, max_len=2000, prompt_len=400).specs
    sizes = [spec.max_tokens for spec in specs]
    assert sum(sizes) == 7 * 200
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (150, 250)
    even = kvc.parse(f"scissorhands:budget={budget},spread=0.0").plan(layout, max_len=2000, prompt_len=400).specs
    assert {spec.max_tokens for spec in even} == {200}


def test_bytes_count_the_history():
    spec = kvc.parse("scissorhands:budget=512,spread=0").spec(max_len=4096, head_dim=64)
    cache = jax.eval_shape(lambda: kvc.init(spec, batch=1, num_kv_heads=1, head_dim=64, dtype=jnp.bfloat16))
    tier = cache.tiers[0]
    per_token = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((tier.k, tier.v, tier.pos, tier.stat))) / 502
    assert per_token == 2 * 64 * 2 + 4 + 4 * 13 + 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scissorhands:budget=12,spread=0.0,recent=12", "budget=12 tokens of a layer must exceed"),
        ("scissorhands:budget=50,spread=0.0,drop=41", "up to 40 tokens"),
        ("scissorhands:drop=1.5", r"drop=1.5 must be a share in \(0, 1\]"),
        ("scissorhands:spread=1.0", r"spread=1.0 must be in \[0, 1\)"),
        ("scissorhands:history=0", "history=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).spec(max_len=100, head_dim=64)


def test_packed_rungs_leave_out_a_prompts_tokens_one_by_one():
    q, k, v = qkv(8, 2, 256, heads=(4, 2))
    kept = []
    for store in ("int8", "int4"):  # 4 bits share words along 8 tokens, 8 bits do not
        cache = make(f"scissorhands:budget=128+{store}", batch=2, num_kv_heads=2, max_len=300, prompt_lens=[256, 256])
        _, cache = prefill(cache, q, k, v, jnp.array([256, 256]))
        kept.append([held(cache, row) for row in range(2)])
    assert kept[0] == kept[1]
