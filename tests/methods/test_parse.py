"""The textual form of methods, the plans they give, and what a bad one is told."""

import jax.numpy as jnp
import pytest

import kvcomp_jax as kvc
from tests.laws.parts import prefill

LAYOUT = kvc.Layout(num_layers=3, num_kv_heads=2, head_dim=64, sliding_windows=(None, 32, None))


@pytest.mark.parametrize(
    "text",
    ["full", "kivi:bits=2,group_size=32", "h2o:budget=0.5+int4", "kivi:k_bits=4,v_bits=2+streaming_llm:budget=300"],
)
def test_text_round_trips(text):
    assert str(kvc.parse(text)) == text
    assert kvc.parse(str(kvc.parse(text))) == kvc.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kivy", "unknown method 'kivy', did you mean 'kivi'"),
        ("kivi:bit=2", "kivi has no option 'bit', did you mean 'bits'"),
        ("kivi:bits", "option 'bits' needs a value"),
        ("kivi:bits=two", "bits='two' must be int"),
        ("kivi:bits=2,bits=4", "option 'bits' is given twice"),
        ("int8:symmetric=maybe", "symmetric='maybe' must be bool"),
        ("kivi+int4", "a selecting and a quantising method"),
        ("", "unknown method ''"),
    ],
)
def test_malformed_text_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        kvc.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kivi:bits=5", "bits=5 must be one of 2, 3, 4, 8"),
        ("kivi:group_size=48", "residual=128 must be a positive multiple of group_size=48"),
        ("kivi:group_size=128,bits=4", "group_size=128 must divide head_dim=64"),
        ("int4:group_size=24", "group_size=24 must divide head_dim=64"),
        ("int4:block_size=12", "block_size=12 must be a multiple of 8"),
        ("streaming_llm:budget=4", "budget=4 tokens must exceed num_sinks=4"),
        ("streaming_llm:budget=1.5", r"budget=1.5 is a fraction and must be in \(0, 1\]"),
        ("h2o:budget=10,recent=10", r"budget=10 tokens must exceed num_sinks=0 \+ recent=10"),
        ("h2o:budget=40+kivi", "budget=40 tokens of a layer is too small"),
        ("int8:window=-1", "window=-1 must be >= 0"),
        ("h2o:budget=0", "budget=0 must be at least 1 token"),
    ],
)
def test_impossible_options_are_refused_with_the_methods_name(text, words):
    with pytest.raises(ValueError, match=words) as error:
        kvc.parse(text).plan(LAYOUT, max_len=512, prompt_len=256)
    assert str(error.value).startswith(text.split(":")[0])


def test_fractions_need_the_prompt():
    with pytest.raises(ValueError, match="pass prompt_len"):
        kvc.parse("h2o:budget=0.5").plan(LAYOUT, max_len=512)


RANKED = ["snapkv:budget=0.5", "snapkv:budget=0.5+int4", "snapstream:budget=0.5", "scissorhands:budget=150,drop=60"]


FORECAST = ["full", "int8", "kivi:bits=2", "h2o:budget=64", "streaming_llm:budget=0.5", "h2o:budget=0.5+int4", *RANKED]


@pytest.mark.parametrize(("text", "dtype"), [*((text, "bfloat16") for text in FORECAST), (FORECAST[2], "float32")])
def test_forecasts_equal_the_real_caches(text, dtype):
    lengths = [300, 170, 129]
    plan = kvc.parse(text).plan(LAYOUT, max_len=400, prompt_len=max(lengths))
    caches = plan.init(batch=3, dtype=jnp.dtype(dtype), prompt_lens=lengths)
    x = jnp.ones((3, 300, 2, 64), dtype)
    filled = [prefill(cache, x, x, x, jnp.array(lengths))[1] for cache in caches]
    assert kvc.forecast(plan, lengths, jnp.dtype(dtype)) == kvc.nbytes(filled)


UNCALIBRATED = {name: info for name, info in kvc.METHODS.items() if not info.calibration}


@pytest.mark.parametrize("select", sorted(name for name, info in UNCALIBRATED.items() if info.axis == "select"))
def test_every_selecting_method_composes_with_every_quantising_one(select):
    """With tokens enough for their blocks; only what ranks tokens itself is refused."""
    layout, sizes = kvc.Layout(num_layers=2, num_kv_heads=2, head_dim=64, num_heads=4), {"max_len": 4096}
    selecting = f"{select}:budget=1024" if "budget" in kvc.METHODS[select].options else select
    for store in sorted(name for name, info in UNCALIBRATED.items() if info.axis == "quantise"):
        method = kvc.parse(f"{selecting}+{store}")
        if store == "zipcache":
            with pytest.raises(ValueError, match=r"ranks tokens itself.* compose one that stores all alike"):
                method.plan(layout, **sizes, prompt_len=4000)
            continue
        (final,) = {spec.rungs[-1].k for spec in kvc.parse(store).plan(layout, **sizes).specs}
        assert final in {spec.rungs[-1].k for spec in method.plan(layout, **sizes, prompt_len=4000).specs}


def test_every_method_is_documented():
    for info in kvc.METHODS.values():
        assert info.summary
        assert info.source
        assert all(option.default is not option.empty for option in info.options.values())
