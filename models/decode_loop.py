"""The decode loop on the device: sample, step, settle when due, until every row is done."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import kvcomp_jax as kvc
from kvcomp_jax.types import pytree
from models.language_model import LanguageModel
from models.programs import compiled
from models.sampling import Sampling, sample


@pytree
class State:
    """What the loop carries."""

    caches: tuple[Any, ...]
    logits: jax.Array  # f32[B, V], of the next token
    tokens: jax.Array  # i32[B, max_new_tokens], -1 = none
    step: jax.Array  # i32[], tokens generated
    done: jax.Array  # bool[B]
    keys: jax.Array  # one a row, so that a row draws the same alone
    since: jax.Array  # i32[], steps since the last settling
    rope_len: jax.Array | None  # i32[B], see `Transformer`; None: the length so far


def start(
    caches: tuple[Any, ...],
    logits: jax.Array,
    max_new_tokens: int,
    *,
    seed: int = 0,
    rope_len: jax.Array | None = None,
) -> State:
    """Return the loop's state before its first token; `logits` f32[B, V] are of that token."""
    rows = logits.shape[0]
    return State(
        caches=caches,
        logits=logits,
        tokens=jnp.full((rows, max_new_tokens), -1, jnp.int32),
        step=jnp.int32(0),
        done=jnp.zeros(rows, bool),
        keys=jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(rows)),
        since=jnp.int32(0),
        rope_len=rope_len,
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def run(settings: tuple[Any, ...], params: Any, state: State, until: jax.Array) -> State:
    """Generate until `until` tokens stand in every row that is not done; settle every block_size steps."""
    model, block_size, sampling, eos_ids = settings

    def going(state: State) -> jax.Array:
        return (state.step < until) & ~state.done.all()

    def step(state: State) -> State:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(state.keys)
        token = jnp.where(state.done, -1, sample(sampling, keys, state.logits))
        ended = (
            (token[:, None] == jnp.asarray(eos_ids, jnp.int32)[None]).any(-1) if eos_ids else jnp.zeros_like(state.done)
        )
        done = state.done | ended
        real = jnp.where(done, 0, 1).astype(jnp.int32)  # rows that ended keep their caches as they are
        token_in = jnp.maximum(token, 0)[:, None]
        logits, caches = model.apply(params, token_in, state.caches, real, logits="last", rope_len=state.rope_len)
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, jnp.where(ended, -1, token)[:, None], state.step, 1)
        return dataclasses.replace(
            state, caches=caches, logits=logits, tokens=tokens, done=done, step=state.step + 1, since=state.since + 1
        )

    def block(state: State) -> State:
        state = lax.while_loop(lambda s: going(s) & (s.since < block_size), step, state)
        return lax.cond(state.since >= block_size, _settle, lambda s: s, state)

    return lax.while_loop(going, block, state)


def _settle(state: State) -> State:
    caches = tuple(kvc.settle(cache) for cache in state.caches)
    return dataclasses.replace(state, caches=caches, since=jnp.int32(0))


class Stepper:
    """The decode loop alone, for measurements: a fixed number of greedy steps that nothing ends early."""

    def __init__(self, lm: LanguageModel, plan: kvc.CachePlan, num_steps: int) -> None:
        self.num_steps, self.compile_s = num_steps, 0.0
        self._lm, self._settings = lm, (lm.model, plan.block_size, Sampling(), ())

    def start(self, caches: tuple[Any, ...]) -> Any:
        """Make the loop's state from caches, which it takes over, and compile the loop once."""
        logits = jnp.zeros((caches[0].length.shape[0], self._lm.config.vocab_size))
        state = start(caches, logits, self.num_steps)
        self._program, seconds = compiled(run, (self._settings,), self._lm.params, state, jnp.int32(0))
        self.compile_s += seconds
        return jax.block_until_ready(state)

    def run(self, state: Any) -> Any:
        """Take all steps, wait for the last, and return the loop's state, in place of the one given."""
        return jax.block_until_ready(self._program(self._lm.params, state, jnp.int32(self.num_steps)))
