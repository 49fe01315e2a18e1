"""Faithfulness of ClusterKV, line by line of its checklist."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.retrieval.resident import hold, no_residents
from tests.laws.parts import decode, decode_many, free_row, make, prefill, qkv
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


COMPRESSED = TEXT.replace("window=16", "window=32").replace("budget=40", "budget=100")
HOST = ",memory=host"


@pytest.mark.parametrize(
    ("text", "store"),
    [
        (TEXT, ""),
        pytest.param(TEXT + ",heads=kv", "", marks=pytest.mark.slow),
        (COMPRESSED, "+kivi:bits=4"),  # pages of 8 tokens, which two clusters may share
        pytest.param(TEXT, "+int8", marks=pytest.mark.slow),
    ],
)
def test_host_memory_changes_no_output_and_copies_are_bitwise_what_stands_there(text, store):
    """Ragged rows, over steps in which windows settle, and past the end, where the oldest tokens are overwritten."""
    prompt, lengths, room, steps = 132, [132, 40, 3], 8, 80
    (q, k, v), device = filled(text + store, prompt, room, lengths=lengths)
    host = filled(text + HOST + store, prompt, room, lengths=lengths)[1]
    assert {x.sharding.memory_kind for x in jax.tree.leaves((host.tiers[0].k, host.tiers[0].v))} == {"pinned_host"}
    at = (jnp.array(lengths)[:, None] + jnp.arange(steps)[None]) % (prompt + room)
    more = [jnp.take_along_axis(x, at[..., None, None], 1) for x in (q, k, v)]
    expected = stream(device, *more)[0]
    outs, caches = stream(host, *more)
    np.testing.assert_allclose(outs, expected, atol=1e-6)
    assert int(caches[-1].tiers[0].entered[0]) > caches[-1].tiers[0].capacity
    for cache in caches[::8]:
        tier, size = cache.tiers[0], cache.tiers[0].lookup.lookup.index.page_size
        page = np.asarray(tier.lookup.resident.page)
        assert (page >= 0).any(-1)[0].all()
        for pool, rows in zip(tier.lookup.pool, (tier.k, tier.v), strict=True):
            for copy, x in zip(jax.tree.leaves(pool), jax.tree.leaves(rows), strict=True):
                pages = np.asarray(copy).reshape(*page.shape, -1)
                found = np.asarray(x).reshape(*x.shape[:2], tier.capacity // size, -1)
                found = np.repeat(found, page.shape[1] // x.shape[1], 1)
                found = np.take_along_axis(found, np.maximum(page, 0)[..., None], 2)
                np.testing.assert_array_equal(pages[page >= 0], found[page >= 0])


def test_a_step_brings_in_exactly_what_the_last_one_did_not_read():
    """Counted by sets of positions, for each query head, over steps in which windows settle."""
    (q, k, v), cache = filled(TEXT + HOST, PROMPT, STEPS)
    _, caches = stream(cache, *(x[:, PROMPT:] for x in (q, k, v)))
    last, counted = [set()] * 4, np.zeros(4, int)
    for t, (before, after) in enumerate(zip([cache, *caches[:-1]], caches, strict=True)):
        sets = [set(s) for s in selected(before, k, np.asarray(q[0, PROMPT + t], np.float64), 40 - SINKS)]
        counted += [len(new - old) for new, old in zip(sets, last, strict=True)]
        resident, last = after.tiers[0].lookup.resident, sets
        np.testing.assert_array_equal(resident.recalled[0], counted)
        np.testing.assert_array_equal(resident.wanted[0], (40 - SINKS) * (t + 1))
        places = stored_positions(after, k)
        for head, page in enumerate(np.asarray(resident.page[0])):
            assert {places[head // 2][n] for n in page} == sets[head]
    moved = kvc.recalls(caches[-1])
    assert (moved.wanted, moved.recalled) == (4 * (40 - SINKS) * STEPS, counted.sum())
    assert moved.recalled < 0.9 * moved.wanted
    assert moved.bytes == moved.recalled * 2 * 64 * 4  # k and v of one head


def test_what_is_wanted_again_does_not_move():
    (q, k, v), cache = filled(TEXT + HOST, PROMPT, 2)
    step = [x[:, PROMPT : PROMPT + 1] for x in (q, k, v)]
    _, first = decode(cache, *step)
    _, second = decode(first, *step)
    a, b = (x.tiers[0].lookup for x in (first, second))
    np.testing.assert_array_equal(a.resident.recalled, 40 - SINKS)
    np.testing.assert_array_equal(b.resident.recalled, 40 - SINKS)
    np.testing.assert_array_equal(b.resident.wanted, 2 * (40 - SINKS))
    jax.tree.map(np.testing.assert_array_equal, (a.resident.page, a.pool), (b.resident.page, b.pool))
    other = jnp.asarray(q[:, PROMPT + 1 :]).at[:, :, :3].set(step[0][:, :, :3])  # one query head turns
    _, third = decode(second, other, *step[1:])
    change = np.asarray(third.tiers[0].lookup.resident.recalled - b.resident.recalled)[0]
    old, new = (selected(second, k, np.asarray(x[0, 0], np.float64), 40 - SINKS)[3] for x in (step[0], other))
    assert change.tolist() == [0, 0, 0, len(set(new) - set(old))]
    assert 0 < change[3] < 40 - SINKS
    stays = np.isin(a.resident.page[0, 3], third.tiers[0].lookup.resident.page[0, 3])
    assert stays.sum() == 40 - SINKS - change[3]
    np.testing.assert_array_equal(a.resident.page[0, 3][stays], third.tiers[0].lookup.resident.page[0, 3][stays])


def test_pages_take_the_slots_of_those_not_wanted():
    state = dataclasses.replace(no_residents(2, 1, 4), page=jnp.array([[[5, -1, 2, 7]], [[1, 3, -1, -1]]], jnp.int32))
    wanted = jnp.array([[[9, 7, 9, 4]], [[0, 2, -1, -1]]], jnp.int32)
    state, new, slot = hold(state, wanted, jnp.array([True, False]), 10)
    assert new.tolist() == [[[9, 4, -1, -1]], [[-1] * 4]]  # 9 is wanted twice
    assert slot.tolist() == [[[0, 1, 4, 4]], [[4] * 4]]
    assert state.page.tolist() == [[[9, 4, -1, 7]], [[1, 3, -1, -1]]]  # nobody asked for the second row
    assert (state.recalled.tolist(), state.wanted.tolist()) == ([[2], [0]], [[3], [0]])


@pytest.mark.parametrize("heads", ["query", "kv"])
def test_copies_for_each_query_head_are_counted(heads):
    text = TEXT + f",heads={heads}"
    (device, host), lists = (filled(text + x, PROMPT, STEPS)[1] for x in ("", HOST)), {"query": 4, "kv": 2}[heads]
    a, b = kvc.nbytes(device), kvc.nbytes(host)
    copies, table = lists * (40 - SINKS) * 2 * 64 * 4, 4 * lists * (40 - SINKS + 2)  # k and v; slots and two counters
    assert b.host == 2 * 2 * host.tiers[0].capacity * 64 * 4
    assert b.allocated - a.allocated == copies + table
    assert (b.used - a.used, b.metadata - a.metadata) == (copies + table, table)


def test_several_tokens_a_call_bring_in_what_single_steps_do():
    (q, k, v), cache = filled(TEXT + HOST, PROMPT, 8, lengths=[PROMPT, 21])
    more = [x[:, PROMPT:] for x in (q, k, v)]
    length = jnp.array([8, 3])
    outs, together = decode(cache, *more, length)
    for t in range(8):
        step = (x[:, t : t + 1] for x in more)
        out, cache = decode(cache, *step, jnp.minimum(jnp.maximum(length - t, 0), 1))
        for row in range(2):
            if t < length[row]:
                np.testing.assert_allclose(outs[row, t], out[row, 0], atol=1e-6)
    a, b = (c.tiers[0].lookup for c in (together, cache))
    jax.tree.map(np.testing.assert_array_equal, (a.resident, a.pool), (b.resident, b.pool))
    freed = free_row(together, 0).tiers[0].lookup.resident
    assert (np.asarray(freed.page[0]) < 0).all()
    assert (np.asarray(freed.page[1]) >= 0).any()


def test_copies_need_the_number_of_query_heads():
    layout = kvc.Layout(num_layers=4, num_kv_heads=2, head_dim=64)
    with pytest.raises(ValueError, match=r"state Layout\.num_heads, or let those of a KV head read the same"):
        kvc.parse("cluster_kv:memory=host").plan(layout, max_len=2048)
    kvc.parse("cluster_kv:memory=host,heads=kv").plan(layout, max_len=2048)
    with pytest.raises(ValueError, match="num_heads=3 must be a multiple of num_kv_heads=2"):
        dataclasses.replace(layout, num_heads=3)
    (q, k, v), cache = filled(TEXT + HOST, PROMPT, 1, heads=(4, 2))
    with pytest.raises(ValueError, match="lists=2 are kept at hand of a KV head, and 1 are read"):
        decode(cache, q[:, PROMPT:, :2], k[:, PROMPT:], v[:, PROMPT:])
    with pytest.raises(ValueError, match="lists=2 must be at least 1, and is 1 unless"):
        kvc.Lookup(kvc.Centroids(heads="kv"), 64, memory="host", lists=2)
