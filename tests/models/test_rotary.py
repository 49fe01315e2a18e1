"""What a layout says of rotations is how each family rotates its keys; activations are what the model computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import models
from models.activations import activations
from tests.models.golden import ATOL, load

SWITCHING = ["llama_dynamic", "phi3_longrope"]


@pytest.mark.parametrize("name", ["llama3_rope", "llama_yarn_mscale", "llama_linear", "gemma3", "qwen3", "gpt2"])
def test_keys_before_rotation_rotated_are_those_of_transformers(name):
    lm, golden = load(name)
    tokens, layout = jnp.asarray(golden["tokens"]), lm.layout
    keys = lambda module, _: module.name in ("k_proj", "k_norm")
    captured = jax.jit(lambda params, x: lm.model.apply(params, x, capture_intermediates=keys)[1])(lm.params, tokens)
    layers = captured["intermediates"]
    pos = jnp.arange(tokens.shape[1])[None, None]
    for i in range(layout.num_layers):
        (k,) = layers[f"layers_{i}"]["attn"]["k_norm" if lm.config.qk_norm else "k_proj"]["__call__"]
        k = k.reshape(*tokens.shape, layout.num_kv_heads, layout.head_dim).swapaxes(1, 2)
        rope = layout.rope(i, tokens.shape[1])
        rotated = k if rope is None else rope.apply(k, pos)
        theirs = golden[f"k{i}"]
        np.testing.assert_allclose(rotated[:, :, -theirs.shape[2] :], theirs, rtol=0, atol=ATOL)
        if rope is not None:
            np.testing.assert_allclose(rope.undo(rotated, pos), k, rtol=0, atol=1e-5)


def test_layers_of_one_model_may_rotate_differently():
    layout = load("gemma3")[0].config.layout
    assert len(set(layout.ropes)) == 2
    assert len(layout.ropes) == layout.num_layers


@pytest.mark.parametrize("name", SWITCHING)
def test_frequencies_that_change_with_the_length_are_known_up_to_there(name):
    lm, _ = load(name)
    limit = lm.config.ropes[0].original_max
    assert lm.layout.rope(0, limit).dim == lm.config.ropes[0].dim
    with pytest.raises(ValueError, match=f"once a text exceeds {limit} tokens.*max_len={limit + 1}"):
        lm.layout.rope(0, limit + 1)


@pytest.mark.slow
def test_weights_are_squares_of_the_gradient_of_the_loss():
    lm, golden = load("qwen3")
    tokens = golden["tokens"][0, :12]
    layer = activations(lm, tokens)[1]

    def loss(name, at, step):
        def shift(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if "/".join(context.module.path) != name:
                return out
            flat = out.reshape(1, len(tokens), -1)
            return flat.at[0, at[0], at[1]].add(step).reshape(out.shape)

        with nn.intercept_methods(shift):
            logits = lm.model.apply(lm.params, jnp.asarray(tokens)[None])[0]
        scores = jax.nn.log_softmax(logits[0, :-1])
        return -float(jnp.take_along_axis(scores, jnp.asarray(tokens)[1:, None], -1).sum())

    for name, weight in (("layers_1/attn/k_norm", layer.k_weight), ("layers_1/attn/v_proj", layer.v_weight)):
        at = np.unravel_index(weight.argmax(), (len(tokens), weight[0, 0].size))  # the largest: least rounding
        slope = (loss(name, at, 1e-2) - loss(name, at, -1e-2)) / 2e-2
        assert weight.max() == pytest.approx(slope**2, rel=0.05)
    assert (layer.v_weight[0, -1] == 0).all()  # nothing follows the last token


def test_fingerprints_tell_models_apart_and_not_dtypes():
    one = load("qwen3")[0]
    same = models.LanguageModel(one.config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), one.params))
    assert same.layout.fingerprint == one.layout.fingerprint
    changed = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 1.1 if "k_proj" in str(path) and "layers_0" in str(path) else x, one.params
    )
    assert models.LanguageModel(one.config, changed).layout.fingerprint != one.layout.fingerprint
    assert load("llama")[0].layout.fingerprint != one.layout.fingerprint
