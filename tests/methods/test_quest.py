"""Faithfulness of Quest: pages by their keys' minimum and maximum, chosen anew by every query head and step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import attend, decode, decode_many, make, prefill, qkv
from tests.methods.recalls import attention_over, filled, stream, whole

PAGE, PROMPT, STEPS = 16, 130, 24


def chosen(scores, num):
    """The `num` pages of the highest scores [N], lower index first among equals."""
    return sorted(range(len(scores)), key=lambda n: (-scores[n], n))[:num]


def reads(q, k, t, num_pages, heads):
    """Tokens that each query head of q [H, D] at position t reads, bool[H, S], by the definition."""
    num_heads, num_kv_heads = q.shape[0], k.shape[1]
    closed = t // PAGE  # what settled before this token came
    upper, lower = (np.stack([f(k[n * PAGE : (n + 1) * PAGE], 0) for n in range(closed)]) for f in (np.max, np.min))
    kv = np.arange(num_heads) // (num_heads // num_kv_heads)
    scores = np.maximum(q[None] * upper[:, kv], q[None] * lower[:, kv]).sum(-1).T  # [H, N]
    if heads == "kv":
        scores = scores.reshape(num_kv_heads, -1, closed).mean(1)[kv]
    elif heads != "query":
        scores = np.broadcast_to(
            scores.reshape(heads, -1, closed).mean(1)[:, None], (heads, num_heads // heads, closed)
        )
        scores = scores.reshape(num_heads, closed)
    keep = np.zeros((num_heads, len(k)), bool)
    keep[:, closed * PAGE : t + 1] = True
    for head in range(num_heads):
        for n in chosen(scores[head], num_pages):
            keep[head, n * PAGE : (n + 1) * PAGE] = True
    return keep


@pytest.mark.parametrize("heads", ["query", "kv", 1, 2])
def test_every_step_reads_the_pages_of_the_highest_upper_bounds(heads):
    (q, k, v), cache = filled(f"quest:budget=64,full_layers=0,heads={heads}", PROMPT, STEPS)
    outs, _ = stream(cache, *(x[:, PROMPT:] for x in (q, k, v)))
    qn, kn, vn = (np.asarray(x[0], np.float64) for x in (q, k, v))
    for t in range(PROMPT, PROMPT + STEPS):
        expected = attention_over(qn[t], kn[: t + 1], vn[: t + 1], reads(qn[t], kn[: t + 1], t, 3, heads))
        np.testing.assert_allclose(outs[0, t - PROMPT], expected, atol=1e-5)
    assert not np.allclose(outs, whole(q, k, v)[:, PROMPT:], atol=1e-3)


def test_no_key_of_a_page_exceeds_its_score():
    keys = qkv(3, 2, 128, heads=(4, 2))[1].swapaxes(1, 2)
    q = qkv(4, 2, 1, heads=(4, 2))[0].reshape(2, 2, 2, -1)
    for dtype in (jnp.float32, jnp.bfloat16):
        rows = keys.astype(dtype)
        index = kvc.Bounds()
        boxes = index.summarise(rows)
        assert boxes.upper.dtype == dtype
        products = jnp.einsum("bkgd,bksd->bkgs", q, rows.astype(jnp.float32)).reshape(2, 2, 2, 8, 16)
        assert bool((index.rank(q, boxes)[..., None] >= products - 1e-4).all())


def test_a_budget_above_the_tokens_changes_nothing():
    (q, k, v), cache = filled("quest:budget=300,full_layers=0", 200, 50)
    assert cache.spec.rungs[0].lookup is None  # not even an index
    (q, k, v), cache = filled("quest:budget=220,full_layers=0", 130, 100, lengths=[130, 40, 1])
    assert cache.spec.rungs[0].lookup is not None
    length = np.array([130, 40, 1])
    at = jnp.asarray(length[:, None] + np.arange(60)[None])[..., None, None]
    out, _ = decode_many(cache, *(jnp.take_along_axis(x, at, 1) for x in (q, k, v)))
    for row, n in enumerate(length):
        np.testing.assert_allclose(out[row], whole(q, k, v)[row, n : n + 60], atol=1e-5)


def test_first_layers_read_everything():
    layout = kvc.Layout(num_layers=4, num_kv_heads=2, head_dim=64)
    specs = kvc.parse("quest:budget=64").plan(layout, max_len=512).specs
    assert [spec.rungs[0].lookup is None for spec in specs] == [True, True, False, False]
    assert all(spec.rungs[0].capacity >= 512 - 64 for spec in specs)  # nothing is evicted anywhere
    specs = kvc.parse("quest:budget=64+kivi:bits=4").plan(layout, max_len=512).specs
    assert specs[0] == kvc.parse("kivi:bits=4").plan(layout, max_len=512).specs[0]
    assert specs[2].rungs[0].lookup.index.page_size == 32  # kivi's groups


def test_tokens_of_a_chunk_read_what_they_would_one_by_one():
    text = "quest:budget=64,full_layers=0"
    (q, k, v), cache = filled(text, 128, 16)
    more = [x[:, 128:] for x in (q, k, v)]
    single, _ = decode_many(cache, *more)
    for out in (decode(cache, *more)[0], attend(kvc.open_prompt(cache, 16, fresh=False), *more)[0]):
        np.testing.assert_allclose(out, single, atol=1e-5)
    padded = [jnp.pad(x[:, :9], ((0, 0), (0, 7), (0, 0), (0, 0))) for x in more]
    out, after = decode(cache, *padded, jnp.array([9]))
    np.testing.assert_allclose(out[:, :9], single[:, :9], atol=1e-5)
    assert int(after.length[0]) == 137


def test_pages_that_are_not_selected_are_not_read():
    """Whatever stands there, NaN even, the output is the same."""
    (q, k, v), cache = filled("quest:budget=64,full_layers=0,heads=1", PROMPT, 1)
    step = [x[:, PROMPT:] for x in (q, k, v)]
    out, _ = decode(cache, *step)
    keep = reads(np.asarray(q[0, PROMPT], np.float64), np.asarray(k[0], np.float64), PROMPT, 3, 1)[0]
    tier = cache.tiers[0]
    bad = jnp.asarray(~np.pad(keep, (0, tier.capacity))[: tier.capacity])[None, None, :, None]
    spoilt = dataclasses.replace(tier, k=jnp.where(bad, jnp.nan, tier.k), v=jnp.where(bad, jnp.nan, tier.v))
    again, _ = decode(dataclasses.replace(cache, tiers=(spoilt,)), *step)
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize(
    "store",
    [
        "kivi:bits=4",
        "int8",
        "fp8",
        "turboquant:bits=4",
        "quarot:bits=4",
        pytest.param("kvcomp:block_size=32", marks=pytest.mark.slow),
    ],
)
def test_recall_over_compressed_pages(store):
    """A composition reads, of the codes that the quantising method alone would hold, the pages selected."""
    text = f"quest:budget=96,full_layers=0+{store}"
    (q, k, v), cache = filled(text, 192, 4)
    index = cache.spec.rungs[0].lookup.index
    out, _ = decode(cache, *(x[:, 192:193] for x in (q, k, v)))
    tier = cache.tiers[0]
    pos = jnp.broadcast_to(jnp.arange(tier.capacity)[None, None], (1, 2, tier.capacity))
    kn, vn = (c.decode(e, pos)[0].swapaxes(0, 1) for c, e in ((tier.k_codec, tier.k), (tier.v_codec, tier.v)))
    size, num = index.page_size, cache.spec.rungs[0].lookup.num_pages
    entered = int(tier.entered[0])
    kn, vn = (np.concatenate([x[:entered], y[0, entered:193]]) for x, y in ((kn, k), (vn, v)))
    qn = np.asarray(q[0, 192])
    scores = np.asarray(index.rank(q[:, 192].reshape(1, 2, 2, -1), tier.lookup.summary)).reshape(4, -1)
    keep = np.zeros((4, 193), bool)
    keep[:, entered:] = True
    for head in range(4):
        for n in chosen(scores[head, : entered // size], num):
            keep[head, n * size : (n + 1) * size] = True
    np.testing.assert_allclose(out[0, 0], attention_over(qn, kn, vn, keep), atol=2e-3)
    exact_boxes = index.summarise(k[:, :entered].swapaxes(1, 2))
    np.testing.assert_array_equal(tier.lookup.summary.upper[:, :, : entered // size], exact_boxes.upper)


def test_streamed_pages_have_the_summaries_of_a_prompt():
    text = "quest:budget=64,full_layers=0"
    (q, k, v), cache = filled(text, 100, 60)
    _, caches = stream(cache, *(x[:, 100:] for x in (q, k, v)))
    _, at_once = prefill(make(text, batch=1, num_kv_heads=2, max_len=160), q, k, v)
    assert int(caches[-1].settled[0]) == int(at_once.settled[0]) == 160
    jax.tree.map(np.testing.assert_array_equal, caches[-1].tiers[0].lookup, at_once.tiers[0].lookup)


def test_summaries_are_counted():
    _, cache = filled("quest:budget=64,full_layers=0", 160)
    plain = filled("full:block_size=16", 160)[1]
    boxes = 2 * 2 * 10 * 64 * 4  # upper and lower, heads, pages, channels, bytes
    assert kvc.nbytes(cache).allocated - kvc.nbytes(plain).allocated == boxes + 4
    assert kvc.nbytes(cache).metadata - kvc.nbytes(plain).metadata == boxes + 4


def test_what_reads_it_is_told():
    _, cache = filled("quest:budget=64,full_layers=0", 96)
    assert kvc.kernels_in_use(cache, num_heads=4)[0].operation == "gather_decode"
    _, cache = filled("quest:budget=64,full_layers=0+fp8", 96)
    assert kvc.kernels_in_use(cache, num_heads=4)[0].operation == "gather, dot and mix"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quest:budget=20", "budget=20 tokens must leave a page of 16 beside the 16 that are always read"),
        ("quest:page_size=0", "page_size=0 must be at least 1"),
        ("quest:full_layers=-1", "full_layers=-1 must not be negative"),
        ("quest:heads=all", "heads='all' must be 'query', 'kv' or a number"),
    ],
)
def test_impossible_options_are_refused(text, words):
    layout = kvc.Layout(num_layers=4, num_kv_heads=2, head_dim=64)
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).plan(layout, max_len=2048)


def test_groups_must_divide_the_heads():
    with pytest.raises(ValueError, match="heads=3 groups must divide the 2 KV heads"):
        make("quest:budget=64,full_layers=0,heads=3", batch=1, num_kv_heads=2, max_len=512)


def test_sliding_window_layers_have_no_index():
    layout = kvc.Layout(num_layers=4, num_kv_heads=2, head_dim=64, sliding_windows=(None, None, None, 300))
    spec = kvc.parse("quest:budget=64+int4").plan(layout, max_len=1000).specs[3]
    assert all(rung.lookup is None for rung in spec.rungs)
    with pytest.raises(ValueError, match="without sliding_window"):
        kvc.LayerSpec(
            rungs=(kvc.Rung(kvc.Identity(), kvc.Identity(), 64, lookup=kvc.Lookup(kvc.Bounds(), 32)),),
            block_size=16,
            sliding_window=64,
        )
