"""A model in an engine of continuous batching: greedy, one program for prompts of each padded length, one for steps."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvcomp_jax as kvc
from kvcomp_jax.serving import Engine, Request
from models.generate import prefill, switches
from models.language_model import LanguageModel
from models.programs import compiled
from models.transformer import Transformer


def make_engine(
    lm: LanguageModel, method: str, requests: Sequence[Request], *, num_slots: int = 8, cache_dtype: Any = None
) -> Engine:
    """Return an engine with room for any of `requests`, none of which is queued yet.

    Args:
      lm: The model; its end-of-text ids end a request.
      method: As on the command line. Budgets that are fractions follow each request's own prompt.
      requests: What may come: the longest sets the sizes.
      num_slots: Requests decoded together.
      cache_dtype: Of exact cached tokens; None is the parameters'.

    Raises:
      ValueError: If there are no requests or slots, or one is too long for the model.
    """
    if not requests or num_slots < 1:
        raise ValueError(f"an engine needs requests and num_slots={num_slots} of at least 1.")
    max_len = max(len(request.prompt) + request.max_new_tokens for request in requests)
    if max_len > lm.config.max_positions:
        raise ValueError(
            f"a prompt and its max_new_tokens make {max_len} tokens, the model has {lm.config.max_positions} positions."
        )
    prompt_len, dtype = max(len(request.prompt) for request in requests), cache_dtype or lm.dtype
    plan = kvc.parse(method).plan(lm.layout, max_len=max_len, prompt_len=prompt_len)
    rope_len = max_len if switches(lm.config) else None

    def read(prompt: tuple[int, ...]) -> tuple[int, Any]:
        empty = plan.init(batch=1, dtype=dtype, prompt_lens=[len(prompt)])
        logits, caches, _, _ = prefill(lm, [prompt], empty, None if rope_len is None else jnp.array([rope_len]))
        return int(np.asarray(logits[0]).argmax()), caches

    def step(tokens: jax.Array, live: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        program, _ = compiled(decode_step, ((lm.model, rope_len),), lm.params, tokens, live, caches)
        return program(lm.params, tokens, live, caches)

    caches = plan.init(batch=num_slots, dtype=dtype, prompt_lens=[prompt_len] * num_slots)
    return Engine(caches, read, step, eos_ids=lm.config.eos_ids)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def decode_step(
    settings: tuple[Transformer, int | None], params: Any, tokens: jax.Array, live: jax.Array, caches: Any
) -> tuple[jax.Array, Any]:
    """The most likely next token i32[B] of every row; rows that are not live keep their caches as they are.

    `settings` are the model and the text length that frequencies go by, None where they do not switch.
    """
    model, rope_len = settings
    lengths = None if rope_len is None else jnp.full_like(tokens, rope_len)
    real = live.astype(jnp.int32)
    logits, caches = model.apply(params, tokens[:, None], caches, real, logits="last", rope_len=lengths)
    return logits.argmax(-1).astype(jnp.int32), caches
