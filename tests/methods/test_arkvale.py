"""Faithfulness of ArkVale, line by line of its checklist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.retrieval.resident import Residents, keep_best, no_residents, recall, slot_of
from tests.laws.parts import decode, decode_many, make, prefill, qkv
from tests.methods.recalls import attention_over, filled, stream, whole

PAGE, SLOTS, RECALLS, PROMPT, STEPS = 8, 5, 2, 130, 60
TEXT = f"arkvale:budget={PAGE * (SLOTS + 3)},page_size={PAGE},recalls={RECALLS},full_layers=0"


def extent(apart, radius):
    """A radius by its name, of distances [..., P, D] in each channel or [..., P, 1]."""
    nearest, farthest = apart.min(-2), apart.max(-2)
    return {"mean": apart.mean(-2), "max": farthest, "center": (nearest + farthest) / 2}[radius]


def page_scores(q, k, num_pages, radius="mean", volume="box"):
    """Scores [H, N] of the rung's pages, which follow one page of sinks, for q [H, D] and keys [S, K, D]."""
    scores = np.zeros((q.shape[0], num_pages))
    for n in range(num_pages):
        keys = k[PAGE + n * PAGE : PAGE + (n + 1) * PAGE].swapaxes(0, 1)  # [K, P, D]
        center = (keys.min(1) + keys.max(1)) / 2
        apart = np.abs(keys - center[:, None])
        if volume == "ball":
            apart = np.sqrt((apart**2).sum(-1, keepdims=True))
        r = extent(apart, radius)  # [K, D or 1]
        for h in range(q.shape[0]):
            g = h // (q.shape[0] // k.shape[1])
            if volume == "ball":
                scores[h, n] = q[h] @ center[g] + r[g, 0] * np.sqrt(q[h] @ q[h])
            else:
                scores[h, n] = np.maximum(q[h] * (center + r)[g], q[h] * (center - r)[g]).sum()
    return scores


def simulate(q, k, v, groups, radius="mean", volume="box"):
    """Outputs of all steps and the resident sets after each: the paper's algorithm in Python sets."""
    heads = q.shape[1]
    num = (PROMPT - 2 * PAGE) // PAGE
    first = page_scores(q[PROMPT - 1], k, num, radius, volume).mean(0)
    tables = [set(np.argsort(-first, kind="stable")[:SLOTS].tolist()) for _ in range(groups)]
    outs, history, recalls = [], [], []
    for t in range(PROMPT, PROMPT + STEPS):
        scores = page_scores(q[t], k, num, radius, volume).reshape(groups, -1, num).mean(1)
        count = 0
        for table, score in zip(tables, scores, strict=True):
            best = np.argsort(-score, kind="stable")[:RECALLS].tolist()
            missing = [n for n in best if n not in table]
            free = SLOTS - len(table)
            for victim in sorted(table, key=lambda n: score[n])[: max(len(missing) - free, 0)]:
                table.remove(victim)
            table.update(missing)
            count += len(missing)
        keep = np.zeros((heads, t + 1), bool)
        keep[:, :PAGE] = keep[:, PAGE + num * PAGE :] = True
        for h in range(heads):
            for n in tables[h // (heads // groups)]:
                keep[h, PAGE + n * PAGE : PAGE + (n + 1) * PAGE] = True
        outs.append(attention_over(q[t], k[: t + 1], v[: t + 1], keep))
        history.append([set(table) for table in tables])
        recalls.append(count)
        if (t + 1 - 2 * PAGE) // PAGE > num:
            for table in tables:
                if len(table) < SLOTS:
                    table.add(num)
            num += 1
    return np.stack(outs), history, recalls


@pytest.mark.parametrize(
    ("groups", "radius", "volume"),
    [
        (1, "mean", "box"),
        (2, "max", "box"),
        (1, "center", "box"),
        (1, "mean", "ball"),
        pytest.param(2, "max", "ball", marks=pytest.mark.slow),
        pytest.param(1, "center", "ball", marks=pytest.mark.slow),
    ],
)
def test_every_step_does_what_the_algorithm_does(groups, radius, volume):
    (q, k, v), cache = filled(TEXT + f",n_groups={groups},radius={radius},volume={volume}", PROMPT, STEPS)
    outs, caches = stream(cache, *(x[:, PROMPT:] for x in (q, k, v)))
    expected, history, recalls = simulate(*(np.asarray(x[0], np.float64) for x in (q, k, v)), groups, radius, volume)
    np.testing.assert_allclose(outs[0], expected, atol=1e-5)
    states = [c.tiers[0].lookup.resident for c in caches]
    for state, tables in zip(states, history, strict=True):
        assert [set(page[page >= 0].tolist()) for page in np.asarray(state.page[0])] == tables
    counted = [int(state.recalled[0].sum()) for state in states]
    np.testing.assert_array_equal(np.diff([0, *counted]), recalls)
    assert max(recalls) <= RECALLS * groups
    assert counted[-1] > 0
    assert [int(s.wanted[0].sum()) for s in states] == [RECALLS * groups * (i + 1) for i in range(STEPS)]


@pytest.mark.parametrize("volume", ["box", "ball"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_largest_radius_is_a_bound(volume, dtype):
    """Under jit too, where XLA may skip a rounding; each key is itself a query, so that balls are touched."""
    index = kvc.Bounds(page=16, volume=volume)
    keys = (100 + qkv(7, 2, 64)[1].swapaxes(1, 2)).astype(dtype)  # [B, K, S, D], of which few bits are left
    volumes = jax.jit(index.summarise)(keys)
    assert {x.dtype for x in jax.tree.leaves(volumes)} == {jnp.dtype(dtype)}
    exact = keys.astype(jnp.float32)
    middle = (exact.reshape(2, 2, 4, 16, -1).min(3) + exact.reshape(2, 2, 4, 16, -1).max(3)) / 2
    q = jnp.concatenate([qkv(1, 2, 1)[0].reshape(2, 2, 2, -1), exact - jnp.repeat(middle, 16, 2)], 2)
    products = jnp.einsum("bkgd,bksd->bkgs", q, exact, precision="highest").reshape(2, 2, -1, 4, 16)
    assert bool((index.rank(q, volumes)[..., None] >= products - 1e-3).all())
    if volume == "ball":
        rows, center, radius = (np.asarray(x, np.float64) for x in (keys, volumes.center, volumes.radius))
        apart = np.sqrt(((rows.reshape(2, 2, 4, 16, -1) - center[:, :, :, None]) ** 2).sum(-1))
        assert (apart <= radius[..., None] * (1 + 1e-6 * (dtype == "float32"))).all()
        assert (radius <= apart.max(-1) * (1 + 2 * float(jnp.finfo(dtype).eps))).all()  # and no more than it must


def test_the_radii_are_what_they_are_named_after():
    keys = jnp.asarray(np.random.default_rng(0).integers(-64, 64, (2, 2, 64, 8)) / 8, jnp.float32)
    rows = np.asarray(keys).reshape(2, 2, 4, 16, 8)
    center = (rows.min(3) + rows.max(3)) / 2
    apart = np.abs(center[:, :, :, None] - rows)
    length = np.sqrt((apart.astype(np.float64) ** 2).sum(-1, keepdims=True))
    for radius in ("mean", "max", "center"):
        boxes = kvc.Bounds(page=16, radius=radius).summarise(keys)
        np.testing.assert_array_equal(boxes.upper, center + extent(apart, radius))  # eighths: sums of them are exact
        np.testing.assert_array_equal(boxes.lower, center - extent(apart, radius))
        balls = kvc.Bounds(page=16, radius=radius, volume="ball").summarise(keys)
        np.testing.assert_array_equal(balls.center, center)
        np.testing.assert_allclose(balls.radius, extent(length, radius)[..., 0], rtol=1e-6)
        assert balls.radius.shape == (2, 2, 4)


def test_the_decomposed_score_is_the_maximum():
    keys = qkv(0, 2, 64)[1].swapaxes(1, 2)
    q = qkv(5, 2, 1)[0].reshape(2, 2, 2, -1)
    index = kvc.Bounds(page=8, radius="mean")
    boxes = index.summarise(keys)
    by_corner = jnp.maximum(q[:, :, :, None] * boxes.upper[:, :, None], q[:, :, :, None] * boxes.lower[:, :, None])
    np.testing.assert_allclose(index.rank(q, boxes), by_corner.sum(-1), atol=1e-4)
    index = kvc.Bounds(page=8, radius="mean", volume="ball")
    balls = index.summarise(keys)
    towards = q / jnp.linalg.norm(q, axis=-1, keepdims=True)
    farthest = balls.center[:, :, None] + balls.radius[:, :, None, :, None] * towards[:, :, :, None]  # [B, K, G, N, D]
    np.testing.assert_allclose(index.rank(q, balls), (q[:, :, :, None] * farthest).sum(-1), atol=1e-4)
    np.testing.assert_array_equal(index.rank(jnp.zeros_like(q), balls), 0)


@pytest.mark.parametrize("store", ["", pytest.param("+int8", marks=pytest.mark.slow), "+int4"])
def test_pages_that_fill_get_the_balls_of_their_exact_keys(store):
    lengths = [100, 41, 9]
    (_, k, _), cache = filled(TEXT + ",volume=ball" + store, max(lengths), 20, lengths=lengths)
    index, caches = cache.spec.rungs[0].lookup.index, [cache]
    at = jnp.asarray(np.array(lengths)[:, None] + np.arange(20)[None])[..., None, None]
    q, *more = (jnp.take_along_axis(x, at, 1) for x in qkv(0, 3, 120))
    caches += stream(cache, q, *more)[1]
    for held in (caches[0], caches[-1]):
        tier = held.tiers[0]
        for row, num in enumerate(np.asarray(tier.entered) // index.page_size):
            keys = k[row : row + 1, PAGE : PAGE + num * index.page_size].swapaxes(1, 2)
            now = jax.tree.map(lambda x, row=row, num=num: x[row : row + 1, :, :num], tier.lookup.summary)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), now, index.summarise(keys))
    assert (caches[-1].tiers[0].entered > cache.tiers[0].entered).all()


def test_a_ball_is_one_number_more_than_a_key():
    held, balls = (kvc.nbytes(filled(TEXT + x, PROMPT, STEPS)[1]) for x in ("", ",volume=ball"))
    cache = filled(TEXT, PROMPT, STEPS)[1]
    pages, live = cache.tiers[0].capacity // PAGE, int(cache.tiers[0].entered[0]) // PAGE
    assert 0 < live < pages
    assert held.allocated - balls.allocated == pages * 2 * (2 * 64 - (64 + 1)) * 4  # heads, numbers, bytes
    assert held.metadata - balls.metadata == held.used - balls.used == live * 2 * (2 * 64 - (64 + 1)) * 4


def table(*pages):
    state = no_residents(1, 1, len(pages))
    return Residents(page=jnp.array([[pages]], jnp.int32), recalled=state.recalled, wanted=state.wanted)


def recalled(state, scores, most, num_slots=None, recalls=None):
    sizes = [
        jnp.array([n]) for n in (len(scores), num_slots or state.page.shape[-1], most if recalls is None else recalls)
    ]
    return recall(state, jnp.array([[scores]], jnp.float32), *sizes, most=most)


def test_victims_are_the_lowest_scored_residents():
    state, new, slot = recalled(table(0, 1, 2), [5.0, 1.0, 3.0, 9.0, 0.0, 7.0], most=2)
    assert state.page.tolist() == [[[0, 3, 5]]]  # 1, then 2 give way to 3, then 5
    assert (new.tolist(), slot.tolist()) == ([[[3, 5]]], [[[1, 2]]])
    assert (state.recalled.tolist(), state.wanted.tolist()) == ([[2]], [[2]])
    state, _, _ = recalled(table(3, -1, 0), [5.0, 1.0, 3.0, 9.0, 0.0, 7.0], most=2)
    assert state.page.tolist() == [[[3, 5, 0]]]  # a free slot comes first, and 3 is at hand already
    assert state.recalled.tolist() == [[1]]
    state, _, _ = recalled(table(0, 1, -1), [5.0, 1.0, 3.0, 9.0], most=2, num_slots=2)
    assert state.page[0, 0, 2] == -1  # a row's own budget
    assert sorted(state.page[0, 0, :2].tolist()) == [0, 3]
    state, _, _ = recalled(table(0, 1, 2), [5.0, 1.0, 3.0, 9.0], most=2, recalls=0)
    assert state.page.tolist() == [[[0, 1, 2]]]


def test_tables_are_inverse_to_each_other_after_any_steps():
    rng, num_pages, slots = np.random.default_rng(3), 12, 4
    state = no_residents(2, 2, slots)
    for step in range(40):
        scores = jnp.asarray(
            rng.standard_normal((2, 2, num_pages)).round(1 if step % 2 else 0), jnp.float32
        )  # with ties
        live = jnp.array([min(step, num_pages), num_pages])
        state, _, _ = recall(state, scores, live, jnp.array([slots, 3]), jnp.array([2, 3]), most=3)
        page, slot = np.asarray(state.page), np.asarray(slot_of(state.page, num_pages))
        for b, g in np.ndindex(2, 2):
            held = {int(n): i for i, n in enumerate(page[b, g]) if n >= 0}
            assert len(held) == (page[b, g] >= 0).sum()
            assert {n: int(i) for n, i in enumerate(slot[b, g]) if i >= 0} == held
            assert all(n < live[b] for n in held)


def test_with_as_many_recalls_as_slots_the_true_best_are_attended():
    scores = np.random.default_rng(4).standard_normal((3, 2, 20))
    state = keep_best(no_residents(3, 2, 6), jnp.asarray(-scores, jnp.float32), jnp.full(3, 20), jnp.full(3, 6))
    state, _, _ = recall(state, jnp.asarray(scores, jnp.float32), *(jnp.full(3, n) for n in (20, 6, 6)), most=6)
    best = np.sort(np.argsort(-scores, -1)[..., :6], -1)
    np.testing.assert_array_equal(np.sort(state.page, -1), best)


def test_a_page_that_was_evicted_and_recalled_is_what_it_was():
    """Rows never move: what the tables point to is bitwise what the prompt stored."""
    (q, k, v), cache = filled(TEXT, PROMPT, STEPS)
    _, caches = stream(cache, *(x[:, PROMPT:] for x in (q, k, v)))
    held = [set(np.asarray(c.tiers[0].lookup.resident.page[0, 0]).tolist()) for c in (cache, *caches)]
    came_back = {n for a, b, c in zip(held, held[1:], held[2:], strict=False) for n in (a - b) & set().union(c)}
    later = {n for i, a in enumerate(held) for n in a if any(n not in b for b in held[i + 1 : -1]) and n in held[-1]}
    assert came_back | later
    kept = int(cache.tiers[0].entered[0])
    np.testing.assert_array_equal(caches[-1].tiers[0].k[:, :, :kept], k[:, PAGE : PAGE + kept].swapaxes(1, 2))


def test_a_budget_of_all_pages_is_full_attention():
    text = TEXT.replace(f"budget={PAGE * (SLOTS + 3)}", "budget=184")
    (q, k, v), cache = filled(text, PROMPT, STEPS, lengths=[PROMPT, 20, 1])
    assert cache.spec.rungs[0].lookup is not None
    length = np.array([PROMPT, 20, 1])
    at = jnp.asarray(length[:, None] + np.arange(STEPS - 15)[None])[..., None, None]
    out, cache = decode_many(cache, *(jnp.take_along_axis(x, at, 1) for x in (q, k, v)))
    for row, n in enumerate(length):
        np.testing.assert_allclose(out[row], whole(q, k, v)[row, n : n + STEPS - 15], atol=1e-5)
    np.testing.assert_array_equal(cache.tiers[0].lookup.resident.recalled, 0)  # all is at hand as it comes


def test_attention_covers_exactly_the_budget():
    (q, k, v), cache = filled(TEXT, PROMPT, STEPS)
    _, caches = stream(cache, *(x[:, PROMPT:] for x in (q, k, v)))
    for t, held in enumerate(caches, PROMPT + 1):
        pages = int((np.asarray(held.tiers[0].lookup.resident.page) >= 0).sum())
        window = (t - PAGE - int(held.settled[0])) // PAGE  # whole pages of it
        assert pages == SLOTS
        assert window == 1
    assert cache.spec.window == PAGE
    assert cache.spec.policy.num_sinks == PAGE


def test_first_layers_are_exact():
    layout = kvc.Layout(num_layers=4, num_kv_heads=2, head_dim=64)
    specs = kvc.parse("arkvale:budget=512").plan(layout, max_len=4096).specs
    assert specs[:2] == kvc.parse("full").plan(layout, max_len=4096).specs[:2]
    lookup = specs[2].rungs[0].lookup
    assert (lookup.index.page_size, lookup.num_pages, lookup.recalls) == (16, 32 - 3, 16 - 2)
    lookup = kvc.parse("arkvale:budget=4096").plan(layout, max_len=9000).specs[2].rungs[0].lookup
    assert (lookup.index.page_size, lookup.num_pages, lookup.recalls) == (32, 128 - 3, 40 - 2)


def test_tokens_of_a_chunk_recall_one_after_another():
    (q, k, v), cache = filled(TEXT, 128, 8)
    more = [x[:, 128:] for x in (q, k, v)]
    single, steps = decode_many(cache, *more)
    out, after = decode(cache, *more)
    np.testing.assert_allclose(out, single, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after.tiers[0].lookup.resident, steps.tiers[0].lookup.resident)


def test_rows_have_the_recalls_of_each_alone():
    text, lengths = "arkvale:budget=0.5,page_size=8,full_layers=0", [200, 120, 64, 30]
    q, k, v = qkv(6, 4, 210)
    cache = make(text, batch=4, num_kv_heads=2, max_len=240, prompt_lens=lengths)
    state = cache.tiers[0].lookup
    assert state.recalls.tolist() == [4, 1, 1, 1]  # half of half the prompt in pages, less two
    assert state.limit.tolist() == [200 // 2 - 24, 120 // 2 - 24, 64 // 2 - 24, 8]
    _, cache = prefill(cache, q[:, :200], k[:, :200], v[:, :200], jnp.array(lengths))
    held = (np.asarray(cache.tiers[0].lookup.resident.page) >= 0).sum(-1)[:, 0]
    assert held.tolist() == [9, 4, 1, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arkvale:budget=48", "budget=48 tokens must leave a page of 16 beside the 48 that are always read"),
        ("arkvale:page_size=0", "page_size=0 must be at least 1"),
        ("arkvale:window_pages=1", "window_pages=1 >= 2"),
        ("arkvale:recalls=0", "recalls=0 must be at least 1 page"),
        ("arkvale:radius=min", "radius='min' must be 'max', 'mean' or 'center'"),
        ("arkvale:volume=sphere", "volume='sphere' must be 'box' or 'ball'"),
        ("arkvale:n_groups=0", "heads=0 must be 'query', 'kv' or a number"),
    ],
)
def test_impossible_options_are_refused(text, words):
    layout = kvc.Layout(num_layers=4, num_kv_heads=2, head_dim=64)
    with pytest.raises(ValueError, match=words):
        kvc.parse(text).plan(layout, max_len=2048)


def test_recalls_need_pages_that_heads_share_and_the_last_query():
    with pytest.raises(ValueError, match="recalls=2 needs an index of pages that heads='kv' or groups"):
        kvc.Lookup(kvc.Bounds(), 64, recalls=2)
    with pytest.raises(ValueError, match="recalls=2 needs an index of pages"):
        kvc.Lookup(kvc.Centroids(heads="kv"), 64, recalls=2)
    rung = kvc.Rung(kvc.Identity(), kvc.Identity(), 64, lookup=kvc.Lookup(kvc.Bounds(heads=1), 32, recalls=1))
    with pytest.raises(ValueError, match=r"needs Recency\(num_queries=1\)"):
        kvc.LayerSpec(rungs=(rung,), block_size=16)


def pooled_rows(cache):
    """Copies on the device and what they are copies of: (slots, keys in slots, keys of those pages on the host)."""
    tier = cache.tiers[0]
    page = np.asarray(tier.lookup.resident.page)[0, 0]
    pools = [np.asarray(x)[0].reshape(2, SLOTS, PAGE, -1) for x in tier.lookup.pool]
    rows = [np.asarray(x)[0].reshape(2, tier.capacity // PAGE, PAGE, -1) for x in (tier.k, tier.v)]
    return page, pools, [x[:, np.maximum(page, 0)] for x in rows]


@pytest.mark.parametrize("volume", ["box", pytest.param("ball", marks=pytest.mark.slow)])
def test_host_memory_changes_no_output_and_copies_are_bitwise_what_stands_there(volume):
    (q, k, v), resident = filled(TEXT + f",volume={volume}", PROMPT, STEPS)
    _, cache = filled(TEXT + f",volume={volume},memory=host", PROMPT, STEPS)
    more = [x[:, PROMPT:] for x in (q, k, v)]
    expected, caches = stream(resident, *more)
    outs, offloaded = stream(cache, *more)
    np.testing.assert_allclose(outs, expected, atol=1e-6)
    for a, b in zip(caches, offloaded, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.tiers[0].lookup.resident, b.tiers[0].lookup.resident)
    for held in (cache, *offloaded[::7], offloaded[-1]):
        _, pools, rows = pooled_rows(held)
        jax.tree.map(np.testing.assert_array_equal, pools, rows)
        kept = int(held.tiers[0].entered[0])  # every page that closed stands on the host, at hand or not
        np.testing.assert_array_equal(held.tiers[0].k[:, :, :kept], k[:, PAGE : PAGE + kept].swapaxes(1, 2))
    moved = kvc.recalls(offloaded[-1])
    assert moved == kvc.recalls(caches[-1])
    assert moved.wanted == RECALLS * STEPS
    assert 0 < moved.recalled < moved.wanted
    assert moved.bytes == moved.recalled * 2 * 2 * PAGE * 64 * 4  # k and v, heads


def test_rows_stand_in_pinned_host_memory_and_are_reported_apart():
    (q, k, v), cache = filled(TEXT + ",memory=host", PROMPT, STEPS)
    step = jax.jit(lambda c, *x: kvc.settle(kvc.decode(c, *x)[1]), donate_argnums=0)
    for t in range(PROMPT, PROMPT + 10):
        cache = step(cache, *(x[:, t : t + 1] for x in (q, k, v)))
    tier = cache.tiers[0]
    assert {x.sharding.memory_kind for x in (tier.k, tier.v)} == {"pinned_host"}
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves((cache.window, tier.lookup))}
    assert kinds == {jax.devices()[0].default_memory().kind}
    moved = jax.jit(lambda c, one: kvc.free_row(kvc.insert_row(c, 0, one), 0))(cache, cache).tiers[0]
    assert {x.sharding.memory_kind for x in (moved.k, moved.v)} == {"pinned_host"}
    held, plain = kvc.nbytes(cache), kvc.nbytes(filled(TEXT, PROMPT, STEPS)[1])
    assert held.host == 2 * 2 * tier.capacity * 64 * 4
    assert held.allocated == plain.allocated + 2 * 2 * SLOTS * PAGE * 64 * 4
    assert plain.host == 0


@pytest.mark.slow
def test_decode_loops_with_rows_on_the_host():
    (q, k, v), cache = filled(TEXT + ",memory=host", 128, 8)
    more = [x[:, 128:] for x in (q, k, v)]
    single, _ = decode_many(cache, *more)

    @jax.jit
    def loop(cache):
        def body(t, state):
            cache, outs = state
            out, cache = kvc.decode(cache, *(jax.lax.dynamic_slice_in_dim(x, t, 1, 1) for x in more))
            return cache, jax.lax.dynamic_update_slice_in_dim(outs, out, t, 1)

        return jax.lax.fori_loop(0, 8, body, (cache, jnp.zeros_like(more[0])))[1]

    np.testing.assert_allclose(loop(cache), single, atol=1e-6)
    np.testing.assert_allclose(decode(cache, *more)[0], single, atol=1e-6)
