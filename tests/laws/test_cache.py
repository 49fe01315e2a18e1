"""Laws 4, 6 and 8, over every registered method."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import (
    BY_AGE,
    FITTED,
    FORMS,
    HEAD_DIM,
    HEADS,
    METHODS,
    attend,
    close_prompt,
    decode,
    decode_many,
    free_row,
    insert_row,
    make,
    prefill,
    qkv,
    settle,
)
from tests.methods.brute import positions

LENGTHS = [70, 33, 1, 5]
STEPS = 40


def lengths_for(text):
    """Prompts down to a single token, but not shorter than a fractional budget's sinks."""
    return [70, 33, 20, 12] if "0.5" in text else LENGTHS


def run(text, q, k, v, lengths, *, steps=STEPS, heads=(4, 2), window=None, dtype=jnp.float32, prompt=None):
    """Prefill `lengths` tokens a row, then decode the next `steps`; returns both outputs and the cache."""
    prompt = prompt or max(lengths)
    cache = make(
        text,
        batch=len(lengths),
        num_kv_heads=heads[1],
        num_heads=heads[0],
        max_len=prompt + steps,
        prompt_lens=lengths,
        window=window,
        dtype=dtype,
    )
    length = jnp.array(lengths)
    out, cache = prefill(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt], length)
    after_prompt = cache
    at = length[:, None] + jnp.arange(steps)[None]
    pick = lambda x: jnp.take_along_axis(x, at[..., None, None], 1)
    decoded, cache = decode_many(cache, pick(q), pick(k), pick(v))
    return out, decoded, cache, after_prompt


def prompted(text, q, k, v):
    """The cache after prompts of `lengths_for(text)`, of the sizes that `run` has, so that programs are shared."""
    prompt, lengths = max(LENGTHS), lengths_for(text)
    cache = make(text, batch=4, num_kv_heads=2, max_len=prompt + STEPS, prompt_lens=lengths)
    return prefill(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt], jnp.array(lengths))[1]


def exact(q, k, v, window=None):
    return kvc.causal_attention(q, k, v, sliding_window=window)


def assert_no_duplicates(cache):
    window, sinks, *tiers = positions(cache)
    known = [tier.pos is not None or not cache.spec.divided for tier in cache.tiers]
    every = np.concatenate([window, sinks, *itertools.compress(tiers, known)], -1)
    for row in every.reshape(-1, every.shape[-1]):
        live = row[row >= 0]
        assert len(live) == len(set(live.tolist()))


EXACT = [
    "full:block_size=16",
    "full:block_size=64",
    "h2o:budget=200",
    "h2o:budget=200,block_size=8",
    "streaming_llm:budget=200",
    "snapkv:budget=200,window=8",
    "ada_kv:budget=200,window=8",
    "r_kv:budget=200,buffer=8,recent=5",
    "snapstream:budget=200,recent=120",
    "tova:budget=200",
    "scissorhands:budget=200,history=20",
    "cluster_kv:budget=109,num_sinks=3,window=16,window_clusters=3,full_layers=0",
]
EXACT_TOO = [
    "expected_attention:budget=200",
    "critical_kv:budget=200,by=snapkv,window=8,projected=false",
    "knorm:budget=200",
]


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        *((text, (6, 2)) for text in EXACT),
        *((text, h) for text in EXACT[1:3] for h in HEADS[::2]),
        *(pytest.param(text, (6, 2), marks=pytest.mark.slow) for text in EXACT_TOO),
    ],
)
def test_exact_ladders_equal_full_attention_while_capacity_suffices(text, heads):
    q, k, v = qkv(0, 4, max(LENGTHS) + STEPS, heads)
    whole = exact(q, k, v)
    out, decoded, _, _ = run(text, q, k, v, LENGTHS, heads=heads)
    for row, n in enumerate(LENGTHS):
        chex.assert_trees_all_close(out[row, :n], whole[row, :n], atol=1e-5)
        chex.assert_trees_all_close(decoded[row], whole[row, n : n + STEPS], atol=1e-5)


def test_two_exact_rungs_lose_nothing_while_either_has_room():
    for policy in (kvc.Recency(), kvc.Recency(num_sinks=3), kvc.HeavyHitter()):
        spec = kvc.LayerSpec(
            rungs=(kvc.Rung(kvc.Identity(), kvc.Identity(), 16), kvc.Rung(kvc.Identity(), kvc.Identity(), 96)),
            policy=policy,
            window=5,
            block_size=8,
        )
        q, k, v = qkv(3, 2, 110)
        cache = kvc.init(spec, batch=2, num_kv_heads=2, head_dim=HEAD_DIM, dtype=jnp.float32)
        _, cache = prefill(cache, q[:, :60], k[:, :60], v[:, :60])
        out, cache = decode_many(cache, q[:, 60:], k[:, 60:], v[:, 60:])
        chex.assert_trees_all_close(out, exact(q, k, v)[:, 60:], atol=1e-5)
        np.testing.assert_array_equal(kvc.live_tokens(cache), 110)


def reads_exactly(text):
    return (
        jax.eval_shape(lambda: make(text, batch=1, num_kv_heads=2, max_len=110, prompt_lens=[70])).spec.prefill
        == "exact"
    )


@pytest.mark.parametrize("text", [m for m in METHODS if reads_exactly(m)])
def test_prefill_is_exact_whatever_is_compressed_afterwards(text):
    q, k, v = qkv(1, 4, max(LENGTHS) + STEPS)
    out, decoded, _, _ = run(text, q, k, v, lengths_for(text))
    whole = exact(q, k, v)
    for row, n in enumerate(lengths_for(text)):
        chex.assert_trees_all_close(out[row, :n], whole[row, :n], atol=1e-5)
    assert bool(jnp.isfinite(decoded).all())


@pytest.mark.parametrize("text", METHODS)
def test_ragged_rows_give_what_each_gives_alone(text):
    """Alone is among copies of itself, so that the programs of four rows serve."""
    q, k, v = qkv(2, 4, max(LENGTHS) + STEPS)
    _, together, _, _ = run(text, q, k, v, lengths_for(text))
    for row, n in enumerate(lengths_for(text)):
        copies = (jnp.repeat(x[row : row + 1], 4, 0) for x in (q, k, v))
        _, alone, _, _ = run(text, *copies, [n] * 4, prompt=max(LENGTHS))
        chex.assert_trees_all_close(together[row], alone[0], atol=2e-5)


@pytest.mark.parametrize("text", METHODS)
def test_replacing_one_row_changes_no_other(text):
    q, k, v = qkv(4, 4, max(LENGTHS) + STEPS)
    changed = [np.concatenate([x[:1], x[1:2] * -3.0 + 1.0, x[2:]]) for x in (q, k, v)]
    _, before, _, _ = run(text, q, k, v, lengths_for(text))
    _, after, _, _ = run(text, *changed, lengths_for(text))
    for row in (0, 2, 3):
        chex.assert_trees_all_close(before[row], after[row], rtol=1e-6, atol=1e-6)
    assert not bool(jnp.allclose(before[1], after[1], atol=1e-3))


@pytest.mark.parametrize("text", METHODS)
def test_chunked_prompts_give_the_same_cache_as_one_pass(text):
    lengths, chunk = lengths_for(text), 16
    q, k, v = qkv(5, 4, max(LENGTHS) + STEPS)
    one_pass, _, _, whole = run(text, q, k, v, lengths)
    cache = make(text, batch=4, num_kv_heads=2, max_len=max(LENGTHS) + STEPS, prompt_lens=lengths)
    base, prompt = kvc.detach(kvc.open_prompt(cache, 80, num_heads=4))
    length, outs = jnp.array(lengths), []
    for start in range(0, 80, chunk):
        here = slice(start, start + chunk)
        out, prompt = attend(prompt, q[:, here], k[:, here], v[:, here], jnp.clip(length - start, 0, chunk))
        outs.append(out)
    chunked = close_prompt(prompt, base)
    assert jax.tree.structure(chunked) == jax.tree.structure(whole)
    same_slots(chunked, whole)
    out = jnp.concatenate(outs, 1)
    for row, n in enumerate(lengths):
        chex.assert_trees_all_close(out[row, :n], one_pass[row, :n], atol=1e-5)


def ladder(*rungs, **options):
    return kvc.LayerSpec(rungs=tuple(kvc.Rung(k, v, n) for k, v, n in rungs), prefill="stored", **options)


TOKENWISE, CHANNELWISE = (kvc.Affine(bits=4, axis=axis, group_size=16) for axis in ("token", "channel"))
STREAMED = {
    "ring": kvc.LayerSpec(window=20, policy=kvc.Recency(num_sinks=3), prefill="stored"),
    "rungs-sinks-eviction": ladder(
        (CHANNELWISE, kvc.Identity(), 32),
        (CHANNELWISE, TOKENWISE, 48),
        policy=kvc.Recency(num_sinks=3),
        window=5,
        block_size=16,
    ),
    "sliding-window": ladder((TOKENWISE, CHANNELWISE, 96), block_size=16, sliding_window=37),
    "integer-products": ladder(
        (kvc.Homomorphic(inner=TOKENWISE), kvc.Homomorphic(inner=CHANNELWISE), 96), block_size=16
    ),
}


@pytest.mark.parametrize("name", STREAMED)
def test_prompts_read_as_stored_give_what_a_stream_gives(name):
    q, k, v = qkv(17, 2, 100)
    cache = kvc.init(STREAMED[name], batch=2, num_kv_heads=2, head_dim=HEAD_DIM, dtype=jnp.float32)
    step = jax.jit(lambda c, *x: (lambda out, c: (out, kvc.settle(c)))(*kvc.decode(c, *x)))
    streamed, stream = [], cache
    for t in range(100):
        out, stream = step(stream, *(x[:, t : t + 1] for x in (q, k, v)))
        streamed.append(out)
    whole, filled = prefill(cache, q, k, v)
    # A stream reads with fused kernels, which order sums otherwise; 8-bit probabilities at a tie round either way.
    atol = 1e-2 if name == "integer-products" else 2e-4
    chex.assert_trees_all_close(whole, jnp.concatenate(streamed, 1), atol=atol)
    same_slots(filled, stream)
    (base, prompt), outs, length = kvc.detach(kvc.open_prompt(cache, 120)), [], jnp.array([100, 51])
    for start in range(0, 100, 40):
        part = [jnp.pad(x, ((0, 0), (0, 20), (0, 0), (0, 0)))[:, start : start + 40] for x in (q, k, v)]
        out, prompt = attend(prompt, *part, jnp.clip(length - start, 0, 40))
        outs.append(out)
    chunked = jnp.concatenate(outs, 1)
    chex.assert_trees_all_close(chunked[0, :100], whole[0], atol=1e-5)
    chex.assert_trees_all_close(chunked[1, :51], whole[1, :51], atol=1e-5)
    alone, at_once = (jax.tree.map(lambda x: x[:1], c) for c in (close_prompt(prompt, base), filled))
    same_slots(alone, at_once)


def test_prompts_cannot_be_read_as_stored_where_the_prompt_decides_what_is():
    with pytest.raises(ValueError, match="prefill='stored' needs a policy that goes by age"):
        kvc.LayerSpec(rungs=(kvc.Rung(TOKENWISE, TOKENWISE, 32),), policy=kvc.HeavyHitter(), prefill="stored")
    with pytest.raises(ValueError, match="prefill='later' must be 'exact' or 'stored'"):
        kvc.LayerSpec(window=4, prefill="later")


def same_slots(a, b):
    """Two caches answer the same: equal counters and positions, equal attention of random queries."""
    np.testing.assert_array_equal(a.length, b.length)
    np.testing.assert_array_equal(a.settled, b.settled)
    for x, y in zip(a.tiers, b.tiers, strict=True):
        np.testing.assert_array_equal(x.entered, y.entered)
        if x.pos is not None:
            np.testing.assert_array_equal(x.pos, y.pos)
    q, k, v = qkv(77, a.length.shape[0], 1)
    chex.assert_trees_all_close(decode(a, q, k, v)[0], decode(b, q, k, v)[0], atol=1e-5)


@pytest.mark.parametrize("text", [m for m in BY_AGE if "0.5" not in m and m not in FITTED])
def test_prefill_then_decode_leaves_the_cache_of_a_longer_prefill(text):
    """Codes are the same whether tokens came in the prompt or one by one."""
    lengths = [max(LENGTHS)] * 4
    q, k, v = qkv(6, 4, max(LENGTHS) + STEPS)
    _, _, short, _ = run(text, q, k, v, lengths)
    size = short.spec.block_size
    empty = make(text, batch=4, num_kv_heads=2, max_len=max(LENGTHS) + STEPS, prompt_lens=lengths)
    _, whole = prefill(empty, q, k, v, jnp.array(lengths) + STEPS)
    for _ in range(3):  # a stream settles at most one block a call; let it catch up
        short = settle(short)
    if whole.spec.rungs:
        assert int(jnp.abs(short.settled - whole.settled).max()) <= size
    if bool((short.settled == whole.settled).all()):
        same_slots(short, whole)
        for x, y in zip(short.tiers, whole.tiers, strict=True):
            if bool((y.entered >= y.capacity).all()):  # empty slots may hold anything
                chex.assert_trees_all_equal((x.k, x.v), (y.k, y.v))


@pytest.mark.parametrize("text", METHODS)
def test_ten_steps_keep_the_structure_and_compile_once(text):
    q, k, v = qkv(9, 4, max(LENGTHS) + STEPS)
    cache = prompted(text, q, k, v)
    avals, compiled = jax.tree.map(jax.typeof, cache), []
    for t in range(10):
        _, cache = decode(cache, q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1])
        cache = settle(cache)
        assert jax.tree.map(jax.typeof, cache) == avals
        compiled.append((decode._cache_size(), settle._cache_size()))
    assert compiled == compiled[:1] * 10


@pytest.mark.parametrize("text", METHODS)
def test_rows_come_and_go_without_touching_others(text):
    prompt, lengths = max(LENGTHS), [60, 25, 44, 70]
    q, k, v = qkv(10, 4, prompt + STEPS)
    many = make(text, batch=4, num_kv_heads=2, max_len=prompt + STEPS, prompt_lens=[prompt] * 4)
    _, read = prefill(many, q[:, :prompt], k[:, :prompt], v[:, :prompt], jnp.array(lengths))
    ones = [jax.tree.map(lambda x, row=row: x[row : row + 1], read) for row in range(4)]
    for row, one in enumerate(ones):
        many = insert_row(many, row, one)
    many = free_row(many, 1)
    assert kvc.live_tokens(many)[1] == 0
    many = insert_row(many, 1, ones[1])
    step = (q[:, prompt : prompt + 1], k[:, prompt : prompt + 1], v[:, prompt : prompt + 1])
    chex.assert_trees_all_close(decode(many, *step)[0], decode(read, *step)[0], atol=1e-5)


@pytest.mark.parametrize("text", METHODS)
def test_rows_with_no_real_token_stay_as_they_are(text):
    q, k, v = qkv(11, 4, max(LENGTHS) + STEPS)
    cache = prompted(text, q, k, v)
    _, after = decode(cache, q[:, :1], k[:, :1], v[:, :1], jnp.array([1, 0, 1, 0]))
    for row in (1, 3):
        chex.assert_trees_all_equal(*(jax.tree.map(lambda x, row=row: x[row], c) for c in (cache, after)))


@pytest.mark.parametrize("text", ["full:block_size=16", "kivi:residual=32", "streaming_llm:budget=40", "h2o:budget=40"])
def test_bfloat16_caches_stay_bfloat16(text):
    q, k, v = qkv(14, 2, 90, dtype=jnp.bfloat16)
    out, decoded, cache, _ = run(text, q, k, v, [50, 20], dtype=jnp.bfloat16)
    assert out.dtype == decoded.dtype == cache.window.k.dtype == jnp.bfloat16
    if text.startswith("full"):
        whole = exact(*(x.astype(jnp.float32) for x in (q, k, v)))
        chex.assert_trees_all_close(decoded[0].astype(jnp.float32), whole[0, 50:90], atol=3e-2)


@pytest.mark.parametrize("text", sorted(FORMS))
def test_a_chunk_on_top_of_a_filled_cache(text):
    """The next turn of a chat: exact among its own tokens, everything kept afterwards."""
    q, k, v = qkv(15, 4, max(LENGTHS) + STEPS)
    lengths, turn = jnp.array(lengths_for(text)), jnp.array([30, 11, 1, 29])
    cache = prompted(text, q, k, v)
    prompt = kvc.open_prompt(cache, 32, fresh=False, num_heads=4)
    at = lengths[:, None] + jnp.arange(32)[None]
    more = [jnp.take_along_axis(x, at[..., None, None], 1) for x in (q, k, v)]
    out, prompt = attend(prompt, *more, turn)
    after = close_prompt(prompt)
    np.testing.assert_array_equal(after.length, lengths + turn)
    assert_no_duplicates(after)
    if text.startswith("full"):
        whole = exact(q, k, v)
        for row in range(4):
            lo, n = int(lengths[row]), int(turn[row])
            chex.assert_trees_all_close(out[row, :n], whole[row, lo : lo + n], atol=1e-5)
        np.testing.assert_array_equal(kvc.live_tokens(after), lengths + turn)


def test_decode_takes_several_tokens_at_once():
    q, k, v = qkv(16, 2, 80)
    cache = make("full:block_size=16", batch=2, num_kv_heads=2, max_len=80)
    _, cache = prefill(cache, q[:, :50], k[:, :50], v[:, :50])
    out, cache = decode(cache, q[:, 50:58], k[:, 50:58], v[:, 50:58])
    chex.assert_trees_all_close(out, exact(q, k, v)[:, 50:58], atol=1e-5)
    with pytest.raises(ValueError, match="at most block_size=16 tokens a call, got T=17"):
        decode(cache, q[:, :17], k[:, :17], v[:, :17])


def test_wrong_shapes_are_refused():
    cache = make("full:block_size=16", batch=2, num_kv_heads=2, max_len=80)
    q, k, v = qkv(0, 2, 4)
    with pytest.raises(ValueError, match="do not fit a cache of batch=2, num_kv_heads=2"):
        prefill(cache, q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2))
    with pytest.raises(ValueError, match="num_heads=5 must be a multiple of num_kv_heads=2"):
        prefill(cache, jnp.zeros((2, 4, 5, HEAD_DIM)), k, v)
    with pytest.raises(ValueError, match="equal B, T and D"):
        prefill(cache, q[:, :3], k, v)
    other = make("full:block_size=16", batch=1, num_kv_heads=2, max_len=96)
    with pytest.raises(ValueError, match="same plan"):
        insert_row(cache, 0, other)
    with pytest.raises(ValueError, match="exceeds the prompt's capacity=2"):
        attend(kvc.open_prompt(cache, 2), q, k, v)
    base, prompt = kvc.detach(kvc.open_prompt(cache, 8))
    for wrong in (lambda: kvc.close_prompt(prompt), lambda: kvc.close_prompt(kvc.open_prompt(cache, 8), base)):
        with pytest.raises(ValueError, match="needs the prompt's cache once"):
            wrong()
    for whole in (kvc.open_prompt(cache, 0, final=True), kvc.open_prompt(cache, 8, fresh=False), prompt):
        with pytest.raises(ValueError, match="detach needs a fresh prompt"):
            kvc.detach(whole)
