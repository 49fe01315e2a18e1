"""Faithfulness of ClusterKV, line by line of its checklist."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import decode, decode_many, make, prefill, qkv
from tests.methods.recalls import attention_over, filled, stream, whole

SINKS, WINDOW, PER_WINDOW = 4, 16, 3
TEXT = f"cluster_kv:budget=40,clusters=9,num_sinks={SINKS},window={WINDOW},window_clusters={PER_WINDOW},full_layers=0"
PROMPT, STEPS = 90, 40


def clusters_of(cache, row=0):
    """Per KV head: [(centroid, slots)] of the clusters that hold something."""
    summary = cache.tiers[0].lookup.summary
    heads = []
    for centroid, size in zip(np.asarray(summary.centroid[row]), np.asarray(summary.size[row]), strict=True):
        first = np.cumsum(size) - size
        heads.append([(c, range(f, f + n)) for c, f, n in zip(centroid, first, size, strict=True) if n])
    return heads


def stored_positions(cache, k, row=0):
    """In each KV head, the text position of every token on the rung, found by its key."""
    tier, positions = cache.tiers[0], []
    for head in range(k.shape[2]):
        where = {np.asarray(key).tobytes(): t for t, key in enumerate(k[row, :, head])}
        rows = np.asarray(tier.k[row, head])[: int(tier.entered[row])]
        positions.append([where[key.tobytes()] for key in rows])
    return positions


def selected(cache, k, q, budget):
    """Positions that each query head of q [H, D] reads of the rung, by the definition, `budget` at most."""
    groups, sets = q.shape[0] // k.shape[2], []
    found, places = clusters_of(cache), stored_positions(cache, k)
    for head in range(q.shape[0]):
        ranked = sorted(found[head // groups], key=lambda c: -(q[head] @ c[0].astype(np.float64)))
        tokens = [places[head // groups][slot] for _, slots in ranked for slot in slots]
        sets.append(tokens[:budget])
    return sets


@pytest.mark.parametrize("heads", ["query", "kv"])
def test_a_budget_of_all_tokens_is_full_attention(heads):
    text = TEXT.replace("budget=40", "budget=129") + f",heads={heads}"
    (q, k, v), cache = filled(text, PROMPT, STEPS, lengths=[PROMPT, 33, 1])
    assert cache.spec.rungs[0].lookup is not None
    length = np.array([PROMPT, 33, 1])
    at = jnp.asarray(length[:, None] + np.arange(STEPS)[None])[..., None, None]
    out, _ = decode_many(cache, *(jnp.take_along_axis(x, at, 1) for x in (q, k, v)))
    for row, n in enumerate(length):
        np.testing.assert_allclose(out[row], whole(q, k, v)[row, n : n + STEPS], atol=1e-5)


def test_labels_are_those_of_the_largest_cosine_and_sizes_sum_to_the_tokens():
    (_, k, _), cache = filled(TEXT, PROMPT)
    assert int(cache.settled[0]) == PROMPT - SINKS
    places = stored_positions(cache, k)
    for head, found in enumerate(clusters_of(cache)):
        assert sorted(places[head]) == list(range(SINKS, PROMPT))  # a permutation
        directions = np.stack([c / np.linalg.norm(c) for c, _ in found])
        for label, (_, slots) in enumerate(found):
            mine = [places[head][slot] for slot in slots]
            assert mine == sorted(mine)  # by position inside a cluster
            cosine = np.asarray(k[0, mine, head]) @ directions.T
            best = cosine.max(-1)
            np.testing.assert_allclose(cosine[:, label], best, atol=1e-5)


def test_centroids_are_means_of_their_keys_as_they_are():
    """Twenty rounds of a numpy k-means from the same keys."""
    text = TEXT.replace("clusters=9", "clusters=5,iterations=3")
    (_, k, _), cache = filled(text, PROMPT)
    index = cache.spec.rungs[0].lookup.index
    draws = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(0), i))) for i in range(5)]
    for head in range(2):
        keys = np.asarray(k[0, SINKS:, head], np.float64)
        centroid = keys[[int(np.float32(u) * np.float32(len(keys))) for u in draws]]
        for _ in range(index.iterations):
            label = (keys @ (centroid / np.linalg.norm(centroid, axis=-1, keepdims=True)).T).argmax(-1)
            centroid = np.stack([keys[label == c].mean(0) if (label == c).any() else centroid[c] for c in range(5)])
        np.testing.assert_allclose(cache.tiers[0].lookup.summary.centroid[0, head, :5], centroid, atol=1e-4)


def test_selected_tokens_are_those_of_the_best_clusters_cut_at_the_budget():
    (q, k, v), cache = filled(TEXT, PROMPT, 1)
    out, after = decode(cache, *(x[:, PROMPT:] for x in (q, k, v)))
    qn, kn, vn = (np.asarray(x[0], np.float64) for x in (q, k, v))
    sets = selected(after, k, qn[PROMPT], 40 - SINKS)
    assert all(len(s) == 40 - SINKS for s in sets)
    keep = np.zeros((4, PROMPT + 1), bool)
    keep[:, :SINKS] = keep[:, PROMPT:] = True
    for head, positions in enumerate(sets):
        keep[head, positions] = True
    np.testing.assert_allclose(out[0, 0], attention_over(qn[PROMPT], kn, vn, keep), atol=1e-5)


def test_sinks_and_the_window_are_always_read():
    """They decide the output alone when every other value is zero, and however they score."""
    (q, k, v), cache = filled(TEXT, PROMPT, STEPS)
    outs, caches = stream(cache, *(x[:, PROMPT:] for x in (q, k, v)))
    qn, kn, vn = (np.asarray(x[0], np.float64) for x in (q, k, v))
    before = [cache, *caches[:-1]]
    for t in (PROMPT, PROMPT + 15, PROMPT + 16, PROMPT + 39):
        held = before[t - PROMPT]
        settled = int(held.settled[0]) + SINKS
        assert settled == PROMPT + (t - PROMPT) // WINDOW * WINDOW
        keep = np.zeros((4, t + 1), bool)
        keep[:, :SINKS] = keep[:, settled:] = True
        for head, positions in enumerate(selected(held, k, qn[t], 40 - SINKS)):
            keep[head, positions] = True
        expected = attention_over(qn[t], kn[: t + 1], vn[: t + 1], keep)
        np.testing.assert_allclose(outs[0, t - PROMPT], expected, atol=1e-5)


def test_first_two_layers_are_exact():
    layout = kvc.Layout(num_layers=4, num_kv_heads=2, head_dim=64)
    specs = kvc.parse("cluster_kv:budget=64").plan(layout, max_len=512).specs
    assert [spec.rungs[0].lookup is None for spec in specs] == [True, True, False, False]
    assert specs[0] == kvc.parse("full").plan(layout, max_len=512).specs[0]


@pytest.mark.slow
def test_clusters_of_a_window_leave_earlier_ones_as_they_are():
    (q, k, v), cache = filled(TEXT, PROMPT, STEPS)
    _, caches = stream(cache, *(x[:, PROMPT:] for x in (q, k, v)))
    old, new = cache.tiers[0].lookup.summary, caches[-1].tiers[0].lookup.summary
    assert int(new.blocks[0]) == STEPS // WINDOW == 2
    np.testing.assert_array_equal(old.centroid[:, :, :9], new.centroid[:, :, :9])
    np.testing.assert_array_equal(old.size[:, :, :9], new.size[:, :, :9])
    np.testing.assert_array_equal(new.size[0, :, 9:].sum(-1), 2 * WINDOW)
    np.testing.assert_array_equal(new.size[0, :, 9 : 9 + PER_WINDOW].sum(-1), WINDOW)
    kept = int(cache.tiers[0].entered[0])
    np.testing.assert_array_equal(cache.tiers[0].k[:, :, :kept], caches[-1].tiers[0].k[:, :, :kept])
    places = stored_positions(caches[-1], k)
    assert all(sorted(p[kept : kept + WINDOW]) == list(range(PROMPT, PROMPT + WINDOW)) for p in places)


def test_a_seed_decides_the_clusters():
    same = [filled(TEXT, PROMPT)[1].tiers[0].lookup.summary for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    other = filled(TEXT + ",seed=1", PROMPT)[1].tiers[0].lookup.summary
    assert bool((other.centroid != same[0].centroid).any())


def test_query_heads_select_alone_or_by_their_mean():
    (q, k, v), cache = filled(TEXT + ",heads=kv", PROMPT, 1)
    out, after = decode(cache, *(x[:, PROMPT:] for x in (q, k, v)))
    qn, kn, vn = (np.asarray(x[0], np.float64) for x in (q, k, v))
    mean = qn[PROMPT].reshape(2, 2, -1).mean(1).repeat(2, 0)
    keep = np.zeros((4, PROMPT + 1), bool)
    keep[:, :SINKS] = keep[:, PROMPT:] = True
    for head, positions in enumerate(selected(after, k, mean, 40 - SINKS)):
        keep[head, positions] = True
    np.testing.assert_allclose(out[0, 0], attention_over(qn[PROMPT], kn, vn, keep), atol=1e-5)


def test_rows_have_the_clusters_of_each_alone():
    text = TEXT.replace("clusters=9,", "")
    lengths = [240, 170, 20, 3]
    q, k, v = qkv(1, 4, 240)
    cache = make(text, batch=4, num_kv_heads=2, max_len=260, prompt_lens=lengths)
    _, together = prefill(cache, q, k, v, jnp.array(lengths))
    sizes = np.asarray(together.tiers[0].lookup.summary.size)
    assert [(s > 0).any(0).sum() for s in sizes] == [2, 2, 1, 0]  # 236 // 80, 166 // 80, at least one, none
    for row in (0, 1, 2):
        copies = [jnp.repeat(x[row : row + 1], 4, 0) for x in (q, k, v)]
        cache = make(text, batch=4, num_kv_heads=2, max_len=260, prompt_lens=[lengths[row]] * 4)
        _, alone = prefill(cache, *copies, jnp.array([lengths[row]] * 4))
        num = (sizes[row] > 0).any(0).sum()
        for name in ("centroid", "size"):
            a, b = (getattr(c.tiers[0].lookup.summary, name) for c in (together, alone))
            np.testing.assert_allclose(a[row, :, :num], b[0, :, :num], atol=1e-5)


@pytest.mark.parametrize("store", ["fp8", "int8", "kivi:bits=4"])
def test_clusters_over_compressed_tokens(store):
    """Codecs that store several tokens together are read by whole units, of which only the cluster's tokens count."""
    text = TEXT.replace("window=16", "window=32").replace("budget=40", "budget=100") + "+" + store
    (q, k, v), cache = filled(text, 132, 1)
    out, after = decode(cache, *(x[:, 132:] for x in (q, k, v)))
    tier = after.tiers[0]
    size, entered = tier.lookup.lookup.index.page_size, int(tier.entered[0])
    assert size == tier.unit
    pos = jnp.zeros((1, 2, tier.capacity), jnp.int32)
    kn, vn = (c.decode(e, pos)[0].swapaxes(0, 1) for c, e in ((tier.k_codec, tier.k), (tier.v_codec, tier.v)))
    rest = [0, 1, 2, 3, *range(SINKS + entered, 133)]
    kn, vn = (np.concatenate([x[:entered], np.asarray(y[0])[rest]]) for x, y in ((kn, k), (vn, v)))
    keep = np.zeros((4, len(kn)), bool)
    keep[:, entered:] = True
    qn = np.asarray(q[0, 132], np.float64)
    for head in range(4):
        left = tier.lookup.lookup.num_pages
        for _, slots in sorted(clusters_of(after)[head // 2], key=lambda c: -(qn[head] @ c[0].astype(np.float64))):
            for page in range(slots[0] // size, slots[-1] // size + 1):
                if left:
                    keep[head, max(slots[0], page * size) : min(slots[-1] + 1, (page + 1) * size)] = True
                    left -= 1
    assert not keep.all()
    np.testing.assert_allclose(out[0, 0], attention_over(qn, kn, vn, keep), atol=2e-3)


def test_what_is_not_selected_is_not_read():
    (q, k, v), cache = filled(TEXT, PROMPT, 1, heads=(2, 2))
    step = [x[:, PROMPT:] for x in (q, k, v)]
    out, _ = decode(cache, *step)
    sets, places = selected(cache, k, np.asarray(q[0, PROMPT], np.float64), 36), stored_positions(cache, k)
    tier = cache.tiers[0]
    bad = np.ones((1, 2, tier.capacity, 1), bool)
    for head in range(2):
        bad[0, head, [places[head].index(p) for p in sets[head]]] = False
    spoilt = dataclasses.replace(tier, k=jnp.where(bad, jnp.nan, tier.k), v=jnp.where(bad, jnp.nan, tier.v))
    again, _ = decode(dataclasses.replace(cache, tiers=(spoilt,)), *step)
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cluster_kv:budget=16", "budget=16 tokens must leave a page of 1 beside the 16 that are always read"),
        ("cluster_kv:clusters=0", "clusters=0 must be at least 1"),
        ("cluster_kv:window=4,window_clusters=8", r"window_clusters=8 in \[1, 4\]"),
        ("cluster_kv:iterations=-1", "iterations=-1 must be >= 0"),
        ("cluster_kv:heads=1", "heads='1' must be 'query', 'kv'"),
    ],
)
def test_impossible_options_are_refused(text, words):
    layout = kvc.Layout(num_layers=4, num_kv_heads=2, head_dim=64)
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).plan(layout, max_len=2048)


@pytest.mark.parametrize("store", ["", pytest.param("+int8", marks=pytest.mark.slow)])
def test_host_memory_changes_no_output(store):
    (q, k, v), resident = filled(TEXT + store, PROMPT, 20)
    _, cache = filled(TEXT + ",memory=host" + store, PROMPT, 20)
    assert {x.sharding.memory_kind for x in jax.tree.leaves((cache.tiers[0].k, cache.tiers[0].v))} == {"pinned_host"}
    more = [x[:, PROMPT:] for x in (q, k, v)]
    expected, outs = (stream(c, *more)[0] for c in (resident, cache))
    np.testing.assert_allclose(outs, expected, atol=1e-6)
