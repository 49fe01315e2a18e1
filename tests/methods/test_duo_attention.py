"""Faithfulness of DuoAttention: which heads stream, what they see, and that they have no buffers for the rest."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.calibrate import About, Activations, save
from kvcomp_jax.methods import METHODS
from tests.laws.parts import HEAD_DIM, attend, close_prompt, decode, prefill, qkv, settle
from tests.methods.brute import held, output, probs_where

SINKS, RECENT, BLOCK = 4, 10, 4
MADE_WITH = {"num_sinks": SINKS, "recent": RECENT}
BEYOND = np.array([[0.1, 0.6, 0.2, 0.5], [0.7, 0.05, 0.3, 0.9], [0.4, 0.01, 0.02, 0.03]], np.float32)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    file = tmp_path_factory.mktemp("duo") / "duo.safetensors"
    save(file, {"beyond": BEYOND}, About("duo_attention", MADE_WITH, "made up"))
    return file


def plan(calibration, *, options="", max_len=120, text="{}"):
    layout = kvc.Layout(num_layers=3, num_kv_heads=4, head_dim=HEAD_DIM)
    duo = f"duo_attention:num_sinks={SINKS},recent={RECENT},block_size={BLOCK},calibration={calibration}{options}"
    return kvc.parse(text.format(duo)).plan(layout, max_len=max_len, prompt_len=80)


@pytest.mark.parametrize(
    ("sparsity", "full"),
    [(0.5, [(1, 3), (0, 2, 3), (0,)]), (0.25, [None, None, (0,)]), (0.0, [None] * 3), (1.0, [()] * 3)],
)
def test_the_share_that_looks_back_least_streams(calibration, sparsity, full):
    specs = plan(calibration, options=f",sparsity={sparsity}").specs
    assert [spec.heads if spec.rungs else () for spec in specs] == full


def test_masses_are_those_of_the_definition():
    draw = np.random.default_rng(0).standard_normal
    q, k, v = draw((2, 40, 6, 16)), draw((2, 40, 2, 16)), draw((2, 40, 2, 16))
    rope = kvc.Rotary(kvc.Constant(1e2 ** (-np.arange(8) / 8).astype(np.float32)))
    made = METHODS["duo_attention"].calibrate(Activations(k, v, k, v, q, rope), **MADE_WITH)["beyond"]
    pos = np.arange(40)[None, :, None]
    turned_q, turned_k = (np.asarray(rope.apply(x.swapaxes(1, 2), pos[:, None, :, 0])).swapaxes(1, 2) for x in (q, k))
    masses = np.zeros((2, 2, 3))
    for sample in range(2):
        keep = np.tri(40, dtype=bool)[None]
        probs = probs_where(turned_q[sample] * 4, turned_k[sample], keep)  # [K, G, T, S]; undoes the scale
        far = (np.arange(40)[None] >= SINKS) & (np.arange(40)[None] <= np.arange(40)[:, None] - RECENT)
        masses[sample] = (probs * far).sum(-1)[:, :, SINKS + RECENT :].mean(-1)
    np.testing.assert_allclose(made, masses.mean(0).max(-1), rtol=1e-4)


def test_streaming_heads_see_sinks_and_recent_and_the_others_all(calibration):
    prompt, steps = 60, 30
    q, k, v = qkv(0, 1, prompt + steps, heads=(8, 4))
    cache = plan(calibration).init(batch=1, dtype=jnp.float32, prompt_lens=[prompt])[0]
    _, cache = prefill(cache, *(x[:, :prompt] for x in (q, k, v)))
    for t in range(prompt, prompt + steps):
        out, cache = decode(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        sets = held(cache)
        assert sets[1] == sets[3] == set(range(t + 1))
        assert sets[0] == sets[2]
        oldest = min(sets[0] - set(range(SINKS)))
        assert set(range(SINKS)) <= sets[0]
        assert sets[0] == set(range(SINKS)) | set(range(oldest, t + 1))
        assert RECENT <= t + 1 - oldest <= RECENT + 2 * BLOCK - 1
        keep = np.zeros((4, 1, prompt + steps), bool)
        for head in range(4):
            keep[head, 0, sorted(sets[head])] = True
        expected = output(probs_where(q[0, t : t + 1], k[0], keep), v[0])
        chex.assert_trees_all_close(out[0], jnp.asarray(expected, jnp.float32), atol=1e-5)
        cache = settle(cache)


def test_streaming_heads_have_no_buffers(calibration):
    caches = plan(calibration, max_len=1024).init(batch=2, dtype=jnp.bfloat16)
    assert [c.tiers[0].k.shape[1] for c in caches] == [2, 3, 1]
    per_head = [2 * c.tiers[0].k.shape[2] * HEAD_DIM * 2 * 2 for c in caches]
    beside = [4 * 2 * (SINKS + c.window.k.shape[2]) * HEAD_DIM * 2 * 2 + 2 * 5 * 4 for c in caches]
    expected = sum(n * x + y for n, x, y in zip((2, 3, 1), per_head, beside, strict=True))
    assert kvc.nbytes(caches).allocated == expected


def test_forecasts_equal_the_real_caches(calibration):
    lengths = [80, 33]
    for text in ("{}", "{}+int4"):
        made = plan(calibration, text=text)
        caches = made.init(batch=2, dtype=jnp.float32, prompt_lens=lengths)
        q, k, v = qkv(1, 2, 80, heads=(8, 4))
        filled = [prefill(cache, q, k, v, jnp.array(lengths))[1] for cache in caches]
        assert kvc.forecast(made, lengths, jnp.float32) == kvc.nbytes(filled)


def test_prompts_can_be_read_as_each_head_decodes(calibration):
    q, k, v = qkv(2, 1, 70, heads=(8, 4))
    empty = plan(calibration, options=",prefill=stored").init(batch=1, dtype=jnp.float32)[0]
    stream, outs = empty, []
    for t in range(70):
        out, stream = decode(stream, *(x[:, t : t + 1] for x in (q, k, v)))
        stream = settle(stream)
        outs.append(out)
    whole, filled = prefill(empty, q, k, v)
    chex.assert_trees_all_close(whole, jnp.concatenate(outs, 1), atol=1e-5)
    assert held(filled) == held(stream)
    exact = kvc.causal_attention(q, k, v)
    chex.assert_trees_all_close(whole[:, :, jnp.array([2, 3, 6, 7])], exact[:, :, jnp.array([2, 3, 6, 7])], atol=1e-5)
    assert not bool(jnp.allclose(whole, exact, atol=1e-2))


def test_compositions_keep_the_groups(calibration):
    made = plan(calibration, text="{}+kivi:bits=4", max_len=400)
    assert [spec.heads for spec in made.specs] == [(1, 3), (0, 2, 3), (0,)]
    q, k, v = qkv(3, 1, 330, heads=(8, 4))
    cache = made.init(batch=1, dtype=jnp.float32)[0]
    prompt = kvc.open_prompt(cache, 330, num_heads=8)
    for start in range(0, 330, 110):
        _, prompt = attend(prompt, *(x[:, start : start + 110] for x in (q, k, v)))
    sets = held(close_prompt(prompt))
    assert sets[1] == set(range(330))
    assert len(sets[0]) < SINKS + RECENT + 2 * cache.spec.block_size


@pytest.mark.parametrize(
    ("options", "words"),
    [(",sparsity=1.5", r"sparsity=1.5 is the share of streaming heads"), (",prefill=later", "prefill='later' must be")],
)
def test_impossible_settings_are_refused(calibration, options, words):
    with pytest.raises(ValueError, match=words):
        plan(calibration, options=options)


def test_models_of_other_heads_are_refused(calibration):
    layout = kvc.Layout(num_layers=3, num_kv_heads=2, head_dim=HEAD_DIM)
    text = f"duo_attention:num_sinks={SINKS},recent={RECENT},calibration={calibration}"
    with pytest.raises(ValueError, match="the calibration is of 4 heads, not of num_kv_heads=2"):
        kvc.parse(text).plan(layout, max_len=100)


def test_texts_too_short_to_look_back_are_refused():
    x = np.zeros((1, 14, 2, 8))
    with pytest.raises(ValueError, match="seq_len=14 must exceed num_sinks=4"):
        METHODS["duo_attention"].calibrate(Activations(x, x, x, x, x), **MADE_WITH)
    with pytest.raises(ValueError, match="without queries"):
        METHODS["duo_attention"].calibrate(Activations(x, x, x, x), **MADE_WITH)
