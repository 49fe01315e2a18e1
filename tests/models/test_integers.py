"""Linear maps in integers: their arithmetic, their bytes, GPTQ, and a whole model in 4 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import models
from models.gptq import gptq_codes, nearest_codes, search_scale
from models.integers import IntegerFormat, integer_product, pack_weight, round_rows, unpack_weight
from models.layers import Linear
from models.names import flatten, unflatten
from tests.models.golden import load

W4A4 = IntegerFormat(weight_bits=4, activation_bits=4)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_weights_take_their_bits_and_come_back(bits):
    codes = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 64)).astype(np.int8)
    words = pack_weight(jnp.asarray(codes), bits)
    assert words.nbytes * 8 == codes.size * bits
    np.testing.assert_array_equal(unpack_weight(words, bits).T, codes)


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_rounded_within_half_a_step(bits, clip):
    x = draw(0, 3, 5, 64)
    x[0, 0] = 0
    codes, scale = map(np.asarray, round_rows(jnp.asarray(x), bits, clip))
    top = 2 ** (bits - 1) - 1
    np.testing.assert_allclose(scale, np.abs(x).max(-1, keepdims=True) * clip / top, rtol=1e-6)
    assert codes.min() >= -top - 1
    assert codes.max() <= top
    inside = np.abs(x) <= scale * top
    assert inside.all() == (clip == 1)
    assert (np.abs(codes * scale - x) <= scale * 0.5001)[inside].all()


@pytest.mark.parametrize(("row_bits", "features"), [(4, 128), (8, 1024), (8, 65536)])
def test_products_are_exact(row_bits, features):
    """The last sum does not fit float32 before it is rounded to it."""
    rng = np.random.default_rng(1)
    rows = rng.integers(-(2 ** (row_bits - 1)), 2 ** (row_bits - 1), (2, features)).astype(np.int8)
    weight = rng.integers(-8, 8, (features, 3)).astype(np.int8)
    rows[0], weight[:, 0] = -(2 ** (row_bits - 1)), -8
    got = integer_product(jnp.asarray(rows), jnp.asarray(weight))
    np.testing.assert_array_equal(got, (rows.astype(np.int64) @ weight).astype(np.float32))


def test_a_map_multiplies_codes_and_scales():
    x, weight, bias = draw(0, 2, 3, 64), draw(1, 24, 64), draw(2, 24)
    scale = search_scale(jnp.asarray(weight), 4)
    codes = nearest_codes(jnp.asarray(weight), scale, 4)
    params = {"codes": pack_weight(codes, 4), "scale": scale, "bias": jnp.asarray(bias)}
    got = Linear(24, True, W4A4).apply({"params": params}, jnp.asarray(x))
    step = np.abs(x).max(-1, keepdims=True) * 0.9 / 7
    rows = np.clip(np.round(x / step), -8, 7)
    want = step * np.asarray(scale, np.float32) * (rows @ np.asarray(codes, np.float32).T) + bias
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert set(params) == set(Linear(24, True, W4A4).init(jax.random.key(0), jnp.asarray(x))["params"])


def test_the_search_for_a_scale_beats_the_widest_one():
    weight = np.random.default_rng(3).standard_t(3, (16, 256)).astype(np.float32)
    found = np.asarray(search_scale(jnp.asarray(weight), 4), np.float32)
    widest = np.abs(weight).max(1) / 7
    error = lambda s: (np.abs(np.clip(np.round(weight / s[:, None]), -8, 7) * s[:, None] - weight) ** 2.4).sum(1)
    tried = np.float32(np.float16(widest[:, None] * (1 - np.arange(80) / 100)))
    np.testing.assert_allclose(error(found), np.min([error(s) for s in tried.T], 0), rtol=1e-4)
    assert (found < widest).mean() > 0.8


@pytest.fixture(scope="module")
def correlated():
    """A weight [16, 96], X^T X of inputs that depend on one another, and scales."""
    x = draw(5, 400, 96) @ draw(6, 96, 96) * 0.1 + draw(7, 400, 1)
    weight = draw(8, 16, 96)
    return weight, (x.T @ x).astype(np.float64), np.asarray(search_scale(jnp.asarray(weight), 4))


def loss(weight, codes, scale, gram):
    error = codes * np.asarray(scale, np.float64)[:, None] - weight
    return np.einsum("ij,jk,ik->", error, gram, error)


def test_gptq_loses_less_on_its_inputs_than_rounding(correlated):
    weight, gram, scale = correlated
    nearest = np.asarray(nearest_codes(jnp.asarray(weight), jnp.asarray(scale), 4))
    assert loss(weight, gptq_codes(weight, gram, scale, 4), scale, gram) < 0.6 * loss(weight, nearest, scale, gram)


def test_gptq_on_independent_inputs_is_rounding(correlated):
    weight, _, scale = correlated
    got = gptq_codes(weight, np.eye(96) * 3, scale, 4)
    np.testing.assert_array_equal(got, nearest_codes(jnp.asarray(weight), jnp.asarray(scale), 4))


def test_blocks_of_gptq_change_nothing(correlated):
    weight, gram, scale = correlated
    whole = gptq_codes(weight, gram, scale, 4, block_size=96)
    assert (whole != gptq_codes(weight, gram, scale, 4, block_size=7)).mean() < 1e-3


def test_inputs_that_never_come_get_code_zero(correlated):
    weight, gram, scale = correlated
    gram = gram.copy()
    gram[5], gram[:, 5] = 0, 0
    assert not gptq_codes(weight, gram, scale, 4)[:, 5].any()


@pytest.fixture(scope="module")
def four_bits():
    lm, golden = load("llama")
    rotated = models.rotate(lm)
    done = []
    packed = models.to_integers(rotated, W4A4, calibration=golden["tokens"], advance=lambda: done.append(1))
    assert len(done) == lm.config.num_layers
    return lm, rotated, packed, golden["tokens"]


def test_weights_are_stored_packed(four_bits):
    lm, rotated, packed, _ = four_bits
    flat, old = flatten(packed.params["params"]), flatten(rotated.params["params"])
    maps = [path.removesuffix(".weight") for path in old if "_proj" in path]
    assert len(maps) == 7 * lm.config.num_layers
    for path in maps:
        values, out = old[f"{path}.weight"].size, old[f"{path}.weight"].shape[0]
        stored = flat[f"{path}.codes"].nbytes + flat[f"{path}.scale"].nbytes
        assert stored * 8 == 4 * values + 16 * out  # 4 + 16 / in_features bits a weight
        assert f"{path}.weight" not in flat
    assert {leaf.dtype.name for leaf in flat.values()} == {"float32", "float16", "uint32"}


def test_gptq_sees_what_rounded_maps_before_it_give(four_bits):
    """The codes of layer 1's queries and output map, from inputs of a float model with the earlier maps rounded."""
    _, rotated, packed, tokens = four_bits
    old, new = (flatten(m.params["params"]) for m in (rotated, packed))
    earlier = [f"layers_0.{path}" for path in
               ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.up_proj", "mlp.gate_proj",
                "mlp.down_proj")]  # fmt: skip
    inner = [f"layers_1.attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    for rounded, wanted in ((earlier, "layers_1.attn.q_proj"), (earlier + inner, "layers_1.attn.o_proj")):
        hats = {
            f"{path}.weight": unpack_weight(new[f"{path}.codes"], 4).T
            * new[f"{path}.scale"].astype(jnp.float32)[:, None]
            for path in rounded
        }
        inputs = inputs_of(rotated, {**old, **hats}, tokens, wanted)
        gram = np.einsum("ni,nj->ij", inputs, inputs, dtype=np.float64)
        want = gptq_codes(old[f"{wanted}.weight"], gram, np.asarray(new[f"{wanted}.scale"]), 4)
        got = np.asarray(unpack_weight(new[f"{wanted}.codes"], 4).T)
        assert (got != want).mean() < 2e-3  # ties, by rounding in the inputs
        plain = inputs_of(rotated, old, tokens, wanted)
        other = gptq_codes(
            old[f"{wanted}.weight"], np.einsum("ni,nj->ij", plain, plain), np.asarray(new[f"{wanted}.scale"]), 4
        )
        assert (got != other).mean() > 1e-2


def unpacked(flat, path):
    return unpack_weight(flat[f"{path}.codes"], 4).T * flat[f"{path}.scale"].astype(jnp.float32)[:, None]


def inputs_of(lm, flat, tokens, path):
    """Inputs [N, M] of a map of a model with these parameters."""
    seen = []

    def watch(call, args, kwargs, context):
        if context.method_name == "__call__" and context.module.path == tuple(path.split(".")):
            seen.append(np.asarray(args[0]))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        lm.model.apply({"params": unflatten(flat)}, jnp.asarray(tokens))
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_gptq_is_nearer_to_the_model_than_rounding(four_bits):
    lm, rotated, _, tokens = four_bits
    exact = np.asarray(lm(tokens))
    w4 = IntegerFormat(weight_bits=4)
    error = lambda m: np.square(np.asarray(m(tokens)) - exact).mean()
    assert error(models.to_integers(rotated, w4, calibration=tokens)) < 0.9 * error(models.to_integers(rotated, w4))


@pytest.mark.slow
def test_a_model_in_four_bits_generates_through_a_four_bit_cache(four_bits, tmp_path):
    _, _, packed, tokens = four_bits
    prompts = [tokens[0, :20].tolist(), tokens[1, :9].tolist()]
    packed.save(tmp_path / "packed")
    again = models.load(tmp_path / "packed", dtype="float32")
    assert again.config == packed.config
    jax.tree.map(np.testing.assert_array_equal, again.params, packed.params)
    made = again.generate(prompts, "quarot:rotate_v=false", max_new_tokens=12)
    assert [len(row) for row in made.tokens] == [12, 12]
    alone = packed.generate(prompts[:1], "quarot:rotate_v=false", max_new_tokens=12)
    assert alone.tokens == made.tokens[:1]
    exact = packed.generate(prompts[:1], "full", max_new_tokens=4).tokens[0]
    whole = np.asarray(packed(np.array([prompts[0] + exact])))[0]
    np.testing.assert_array_equal(whole[19:23].argmax(-1), exact)  # one pass and decoding agree


def test_only_the_last_map_of_the_mlp_takes_bytes(four_bits):
    _, rotated, _, tokens = four_bits
    bits = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            bits.append((context.module.name, context.module.integers.activation_bits))
        return call(*args, **kwargs)

    lm = models.to_integers(rotated, IntegerFormat(activation_bits=4, down_activation_bits=8))
    with nn.intercept_methods(watch):
        lm.model.apply(lm.params, jnp.asarray(tokens))
    assert {b for name, b in bits if name == "down_proj"} == {8}
    assert {b for name, b in bits if name != "down_proj"} == {4}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: IntegerFormat(weight_bits=5), "weight_bits=5 must be one of 2, 3, 4, 8"),
        (lambda: IntegerFormat(activation_bits=4, activation_clip=0), r"activation_clip=0 must be in \(0, 1\]"),
        (lambda: IntegerFormat(down_activation_bits=8), "down_activation_bits=8 needs activation_bits"),
    ],
)
def test_impossible_formats_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        change()


def test_models_that_cannot_be_packed_are_refused(four_bits):
    lm, _, packed, tokens = four_bits
    with pytest.raises(ValueError, match="packed at 4 bits already"):
        models.to_integers(packed, W4A4)
    with pytest.raises(ValueError, match=r"calibration must be a non-empty \[N, T\]"):
        models.to_integers(lm, W4A4, calibration=tokens[0])
    qwen2, _ = load("qwen2")
    with pytest.raises(ValueError, match="in_features=48 of a map must be a multiple of 32 to be packed at 3 bits"):
        models.to_integers(qwen2, IntegerFormat(weight_bits=3))
