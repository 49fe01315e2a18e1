"""Requests that come and go: each gets what it gets alone, and nothing is compiled again."""

import dataclasses

import numpy as np
import pytest

from kvcomp_jax.serving import Request, engine
from models import batching, programs
from tests.models.golden import load

METHODS = [
    "full:block_size=8",
    pytest.param("kivi:bits=2,group_size=16,residual=16", marks=pytest.mark.slow),
    "h2o:budget=24,num_sinks=2,recent=8",
    "snapstream:budget=0.5,num_queries=8",
    "streaming_llm:budget=20",
]


def draw(num=8, seed=0):
    rng = np.random.default_rng(seed)
    lengths, news, arrivals = rng.integers(20, 60, num), rng.integers(1, 40, num), np.sort(rng.integers(0, 30, num))
    return [
        Request(tuple(rng.integers(1, 199, n).tolist()), int(new), int(at))
        for n, new, at in zip(lengths, news, arrivals, strict=True)
    ]


def num_programs():
    """Of a decode step, of inserting, freeing and settling rows."""
    kept = [program._cache_size() for program in (engine._insert, engine._free, engine._settle)]
    return [programs.count(batching.decode_step), *kept]


@pytest.fixture(scope="module")
def lm():
    return load("llama")[0]


@pytest.mark.parametrize("method", METHODS)
def test_each_request_gets_what_it_gets_alone_and_compiles_nothing(lm, method):
    requests, before = draw(), num_programs()
    together = batching.make_engine(lm, method, requests, num_slots=3)
    shared = []
    outputs = together.run(requests, lambda e: shared.append(sum(number is not None for number in e.slots)))
    assert max(shared) == 3
    assert together.steps < 0.7 * sum(r.max_new_tokens for r in requests)
    alone = batching.make_engine(lm, method, requests, num_slots=3)
    for request, got in zip(requests, outputs, strict=True):
        assert alone.run([dataclasses.replace(request, arrival=0)])[-1] == got
    assert [after - x for x, after in zip(before, num_programs(), strict=True)] in ([1, 1, 1, 1], [1, 1, 1, 0])
    longest = max(range(len(requests)), key=lambda i: requests[i].max_new_tokens)
    request = requests[longest]
    assert lm.generate([request.prompt], method, max_new_tokens=request.max_new_tokens).tokens[0] == outputs[longest]


def test_an_end_of_text_id_ends_a_request_and_is_not_kept(lm):
    requests = [Request(tuple(range(20, 50)), 10), Request(tuple(range(60, 80)), 4)]
    plain = batching.make_engine(lm, "full", requests, num_slots=2).run(requests)
    end = plain[0][3]
    ending = dataclasses.replace(lm, config=dataclasses.replace(lm.config, eos_ids=(end,)))
    got = batching.make_engine(ending, "full", requests, num_slots=2).run(requests)
    assert got[0] == plain[0][: plain[0].index(end)]


@pytest.mark.slow
def test_frequencies_that_switch_go_by_the_longest_text():
    lm, _ = load("phi3_longrope")
    rng = np.random.default_rng(0)
    lengths = (20, 24)  # of 48 in all: frequencies switch at 32
    requests = [Request(tuple(rng.integers(1, lm.config.vocab_size, n).tolist()), 48 - n) for n in lengths]
    outputs = batching.make_engine(lm, "full", requests, num_slots=2).run(requests)
    for request, got in zip(requests, outputs, strict=True):
        assert got == lm.generate([request.prompt], max_new_tokens=request.max_new_tokens).tokens[0]


def test_requests_wait_for_their_arrival_and_for_a_slot(lm):
    requests = [Request((5, 6, 7), 3, arrival=4), Request((5, 6, 7), 1), Request((8, 9), 5)]
    held = []
    got = batching.make_engine(lm, "full", requests, num_slots=1).run(requests[1:] + requests[:1], held.append)
    assert [len(row) for row in got] == [1, 5, 3]
    assert len(held) == 4 + 2  # the first token of each comes from its prompt


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"requests": []}, "needs requests"),
        ({"num_slots": 0}, "num_slots=0"),
        ({"requests": [Request((1,) * 500, 20)]}, "520 tokens, the model has 512 positions"),
        ({"method": "kivy"}, "did you mean 'kivi'"),
    ],
)
def test_bad_calls_are_refused(lm, change, words):
    options = {"method": "full", "requests": draw(2), "num_slots": 2} | change
    with pytest.raises(ValueError, match=words):
        batching.make_engine(lm, **options)


@pytest.mark.parametrize(("prompt", "new"), [((), 3), ((1,), 0)])
def test_empty_requests_are_refused(prompt, new):
    with pytest.raises(ValueError, match="max_new_tokens"):
        Request(prompt, new)
