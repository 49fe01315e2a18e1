"""Released sizes, without making an array: parameters as the model cards count them, shapes of a step with caches."""

import math

import jax
import jax.numpy as jnp
import pytest

import kvcomp_jax as kvc
from models import ModelConfig, Transformer
from models.transformer import param_shapes
from tests.models.released import PARAMETERS, PHI4_MINI


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    values, count = PARAMETERS[name]
    shapes = param_shapes(ModelConfig.from_hf(values))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    "values", [PARAMETERS["Llama-3-8B"][0], PARAMETERS["Gemma-2-9B"][0], PHI4_MINI], ids=lambda v: v["model_type"]
)
def test_a_decode_step_keeps_the_shapes_of_its_caches(values):
    config = ModelConfig.from_hf(values)
    plan = kvc.parse("full").plan(config.layout, max_len=512)
    caches = jax.eval_shape(lambda: plan.init(batch=2, dtype=jnp.bfloat16))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), param_shapes(config))
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    logits, after = jax.eval_shape(Transformer(config, dtype=jnp.bfloat16).apply, shapes, tokens, caches)
    assert (logits.shape, logits.dtype) == ((2, 1, config.vocab_size), jnp.float32)
    assert jax.tree.structure(after) == jax.tree.structure(caches)
    assert jax.tree.leaves(after) == jax.tree.leaves(caches)
