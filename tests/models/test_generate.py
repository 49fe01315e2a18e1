"""Generation: rows are independent, greedy equals one pass, texts stop and stream as they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import generate, programs
from tests.experiments.tiny import write_model
from tests.models.golden import PROMPT, forward, load

METHODS = ["full", "kivi:bits=2,group_size=16,residual=16", "h2o:budget=20"]


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    """A tiny model with a tokenizer of one id a character."""
    return models.load(write_model(tmp_path_factory.mktemp("model")), dtype="float32")


@pytest.mark.parametrize("method", METHODS)
def test_each_prompt_gives_what_it_gives_alone(method):
    lm, _ = load("llama")
    prompts = [list(range(20, 20 + n)) for n in (37, 5, 70)]
    options = {"max_new_tokens": 20, "temperature": 0.8, "top_k": 20, "seed": 3}
    together = lm.generate(prompts, method, **options).tokens
    assert [len(row) for row in together] == [20, 20, 20]
    alone = lm.generate(prompts[:1], method, **options).tokens
    assert alone[0] == together[0]  # row i draws from key (seed, i): the first row alone is the first row


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_greedy_continuations_are_the_other_implementations(name):
    lm, golden = load(name)
    text = golden["greedy"][0]
    (got,) = lm.generate([text[:PROMPT].tolist()], max_new_tokens=len(text) - PROMPT).tokens
    wanted = text[PROMPT:].tolist()
    end = next((i for i, token in enumerate(wanted) if token in lm.config.eos_ids), len(wanted))
    assert got == wanted[:end]


def test_frequencies_that_switch_go_by_the_final_length():
    """A longrope text that crosses the original context while decoding equals one pass over the final text."""
    lm, golden = load("phi3_longrope")
    prompt = golden["tokens"][0, :20].tolist()
    (new,) = lm.generate([prompt], max_new_tokens=28).tokens
    text = jnp.asarray([prompt + new])
    assert text.shape[1] == 48 > lm.config.ropes[0].original_max > 20
    logits, _ = forward("phi3_longrope")(text, None, None, rope_len=jnp.array([48]))
    np.testing.assert_array_equal(jnp.argmax(logits[0, 19:-1], -1), new)


def test_streamed_pieces_make_the_text(speller):
    pieces = {0: "", 1: ""}

    def stream(row, text):
        pieces[row] += text

    prompts = ["the quick brown fox", "a"]
    streamed = speller.generate(prompts, max_new_tokens=12, stream=stream)
    whole = speller.generate(prompts, max_new_tokens=12)
    assert streamed.tokens == whole.tokens
    assert [pieces[0], pieces[1]] == streamed.texts == whole.texts


def test_a_stop_text_is_cut_off(speller):
    (whole,) = speller.generate("the quick brown fox", max_new_tokens=12).texts
    stop = whole[4:6]
    (cut,) = speller.generate("the quick brown fox", max_new_tokens=12, stop=stop).texts
    assert cut == whole[: whole.index(stop)]


def test_an_end_of_text_id_ends_a_row_and_is_not_kept():
    lm, _ = load("llama")
    prompt = [list(range(20, 50)), list(range(60, 80))]
    plain = lm.generate(prompt, max_new_tokens=10).tokens
    ending = dataclasses.replace(lm, config=dataclasses.replace(lm.config, eos_ids=(plain[0][3],)))
    got = ending.generate(prompt, max_new_tokens=10).tokens
    first = plain[0].index(plain[0][3])
    assert got[0] == plain[0][:first]
    assert got[1] == plain[1][: plain[1].index(plain[0][3])] if plain[0][3] in plain[1] else got[1] == plain[1]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([], {}, "no prompts given"),
        ([[1, 900]], {}, "prompt 0 has an id outside the vocabulary"),
        ("text", {}, "no tokenizer"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1] * 500], {"max_new_tokens": 20}, "exceed the model's 512 positions"),
        ([[1]], {"stop": "x"}, "this model has no tokenizer"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"method": "kivy"}, "did you mean 'kivi'"),
    ],
)
def test_bad_calls_are_refused(prompts, options, words):
    lm, _ = load("llama")
    with pytest.raises(ValueError, match=words):
        lm.generate(prompts, **options)


@pytest.mark.parametrize("chunk", [pytest.param(32, marks=pytest.mark.slow), 512], ids="chunk={}".format)
def test_methods_share_the_program_that_reads_prompts_and_layers_the_one_that_compresses(monkeypatch, chunk):
    """Compressing comes after reading, so only what a policy wants to see of a prompt makes reading another program."""
    monkeypatch.setattr(programs, "_programs", {})
    monkeypatch.setattr(generate, "CHUNK", chunk)
    lm, _ = load("llama")
    prompt = [list(range(20, 90))]
    for method in ("full", "int4", "kivi:bits=2,group_size=16,residual=16", "streaming_llm:budget=16"):
        lm.generate(prompt, method, max_new_tokens=2)
    assert (programs.count(generate._read_chunk), programs.count(generate._close)) == (1, 4)
    lm.generate(prompt, "h2o:budget=20", max_new_tokens=2)
    assert (programs.count(generate._read_chunk), programs.count(generate._close)) == (2, 5)


def test_programs_compiled_in_a_block_are_forgotten_at_its_end(monkeypatch):
    monkeypatch.setattr(programs, "_programs", {})

    def double(x):
        return 2 * x

    def triple(x):
        return 3 * x

    double, triple, x = jax.jit(double), jax.jit(triple), jnp.ones(3)
    kept, _ = programs.compiled(double, (), x)
    with programs.forgetting():
        programs.compiled(triple, (), x)
        assert programs.compiled(double, (), x) == (kept, 0.0)
    assert (programs.count(double), programs.count(triple)) == (1, 0)
    np.testing.assert_array_equal(kept(x), 2 * x)
