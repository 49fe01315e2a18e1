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

    def step(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        logits, state = _decode(model, block_size, params, token, state)
        return state, logits

    return lax.scan(step, (caches, jnp.int32(0)), tokens[:-1])[1]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def feed(
    model: Transformer, block_size: int, params: Any, tokens: jax.Array, targets: jax.Array, state: tuple[Any, Any]
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Feed tokens i32[N, T] on top of caches and score targets i32[N, T], each the token after.

    T = 1 decodes one by one, so that flushes and evictions count; with more, the T tokens of a row are read together,
    each attending to the cache as it was before them and exactly to those of its row.

    Args:
      model, block_size: `CachePlan.block_size` of the caches.
      params: Of the model.
      tokens, targets: See above.
      state: Caches, and i32[] steps since they last settled, 0 at first.

    Returns:
      Negative log-likelihoods f32[N * T], and the state.
    """
    heads, num_tokens = model.config.num_heads, tokens.shape[1]

    def step(state: Any, row: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        if num_tokens == 1:
            logits, state = _decode(model, block_size, params, row[0][0], state)
            logits = logits[None]
        else:
            turn = tuple(
                kvc.open_prompt(cache, num_tokens, fresh=False, final=True, num_heads=heads) for cache in state[0]
            )
            out, caches = model.apply(params, row[0][None], turn)
            logits, state = out[0], (caches, state[1])
        log_probs = jax.nn.log_softmax(logits, -1)
        return state, -jnp.take_along_axis(log_probs, row[1][:, None], -1)[:, 0]

    state, nll = lax.scan(step, state, (tokens, targets))
    return nll.reshape(-1), state


def _decode(
    model: Transformer, block_size: int, params: Any, token: jax.Array, state: tuple[Any, Any]
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Decode one token i32[] and settle when due: logits f32[V], caches and steps since they settled."""
    caches, since = state
    logits, caches = model.apply(params, token[None, None], caches)
    due = since + 1 >= block_size
    caches = lax.cond(due, lambda cs: tuple(kvc.settle(c) for c in cs), lambda cs: cs, caches)
    return logits[0, 0], (caches, jnp.where(due, 0, since + 1))


_compare = jax.jit(compare_logits)


def judge(reference: jax.Array, logits: jax.Array, targets: np.ndarray) -> Score:
    """Compare a method's logits with the full cache's."""
    nll, kl, top1 = _compare(reference, logits, jnp.asarray(targets))
    return Score(float(nll), max(float(kl), 0.0), float(top1))
