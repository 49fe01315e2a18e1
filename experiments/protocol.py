"""The evaluation protocol: prefill and compress a context, then score the tokens after it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kvcomp_jax as kvc
from models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one window: mean negative log-likelihood and mean KL(full || method) in nats a token, top-1 agreement."""

    nll: float
    kl: float
    top1: float


def cut_windows(tokens: list[int], *, context: int, score: int, windows: int) -> np.ndarray:
    """Window i starts at i * floor(len / windows) and has context + score tokens: i32[windows, context + score].

    Raises:
      ValueError: If sizes are impossible or the text is too short.
    """
    for name, value, least in (("context", context, 1), ("score", score, 2), ("windows", windows, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    stride, size = len(tokens) // windows, context + score
    if (windows - 1) * stride + size > len(tokens):
        raise ValueError(
            f"the text has {len(tokens)} tokens; windows={windows} of context={context} + score={score} tokens need "
            f"at least {windows * size}: take a longer text or fewer windows."
        )
    return np.stack([np.asarray(tokens[i * stride : i * stride + size], np.int32) for i in range(windows)])


def compare_logits(
    reference: jax.Array, logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean NLL of targets i32[N] under logits f32[N, V], mean KL(reference || logits), share of equal top tokens."""
    p, q = jax.nn.log_softmax(reference, -1), jax.nn.log_softmax(logits, -1)
    nll = -jnp.take_along_axis(q, targets[:, None], -1).mean()
    kl = (jnp.exp(p) * (p - q)).sum(-1).mean()
    return nll, kl, (reference.argmax(-1) == logits.argmax(-1)).mean()


@functools.partial(jax.jit, static_argnums=0)
def score_chunk(model: Transformer, params: Any, tokens: jax.Array, caches: tuple[Any, ...]) -> jax.Array:
    """Logits f32[S - 1, V] for the tokens after the first of tokens i32[S], read in one pass on top of the caches.

    Each attends to the compressed prefix and exactly to the chunk so far.
    """
    heads = model.config.num_heads
    prompts = tuple(kvc.open_prompt(cache, len(tokens), fresh=False, num_heads=heads) for cache in caches)
    return model.apply(params, tokens[None], prompts)[0][0, :-1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_stream(
    model: Transformer, block_size: int, params: Any, tokens: jax.Array, caches: tuple[Any, ...]
) -> jax.Array:
    """As `score_chunk`, but tokens go one at a time through `decode`, so that flushes and evictions count."""

    def step(carry: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        caches, since = carry
        logits, caches = model.apply(params, token[None, None], caches)
        due = since + 1 >= block_size
        caches = lax.cond(due, lambda cs: tuple(kvc.settle(c) for c in cs), lambda cs: cs, caches)
        return (caches, jnp.where(due, 0, since + 1)), logits[0, 0]

    return lax.scan(step, (caches, jnp.int32(0)), tokens[:-1])[1]


_compare = jax.jit(compare_logits)


def judge(reference: jax.Array, logits: jax.Array, targets: np.ndarray) -> Score:
    """Compare a method's logits with the full cache's."""
    nll, kl, top1 = _compare(reference, logits, jnp.asarray(targets))
    return Score(float(nll), max(float(kl), 0.0), float(top1))
