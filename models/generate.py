"""Generation: prompts in chunks, then the whole decode loop on the device."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kvcomp_jax as kvc
from kvcomp_jax.types import pytree
from models.language_model import LanguageModel
from models.sampling import Sampling, sample
from models.tokenizer import TextStream
from models.transformer import Transformer

CHUNK = 512  # prompt tokens a pass


@dataclasses.dataclass(frozen=True)
class Stats:
    """Seconds, tokens a second over all rows, and bytes at the end.

    `compile_s` is apart from the others. `full` is what an uncompressed cache would occupy after the same tokens.
    """

    prefill_s: float
    decode_s: float
    compile_s: float
    tokens_per_s: float
    cache: kvc.Bytes
    full: kvc.Bytes


@dataclasses.dataclass(frozen=True)
class Generation:
    """Continuations, one a prompt: text without the prompt (None without a tokenizer), ids, and what it cost."""

    texts: list[str] | None
    tokens: list[list[int]]
    stats: Stats


@pytree
class _State:
    caches: tuple[Any, ...]
    logits: jax.Array  # f32[B, V], of the next token
    tokens: jax.Array  # i32[B, max_new_tokens], -1 = none
    step: jax.Array  # i32[], tokens generated
    done: jax.Array  # bool[B]
    keys: jax.Array  # one a row, so that a row draws the same alone
    since: jax.Array  # i32[], steps since the last settling


def generate(
    lm: LanguageModel,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    method: str = "full",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stream: Callable[[int, str], None] | None = None,
    cache_dtype: Any = None,
) -> Generation:
    """Continue prompts with a compressed cache.

    Args:
      lm: The model.
      prompts: One text, several, or lists of ids; lengths may differ, each row gives what it gives alone.
      method: As on the command line, e.g. "kivi:bits=2".
      max_new_tokens: At most so many a row; a row ends earlier at an end-of-text id or a stop text.
      temperature, top_k, top_p, seed: See `sampling`; row i draws from key (seed, i).
      stop: Texts that end a row; they are cut off.
      stream: Called with (row, text) as text becomes final; costs one round trip to the host a token.
      cache_dtype: Of exact cached tokens; None is the parameters'.

    Raises:
      ValueError: If a prompt is empty or too long for the model, an option is impossible, or text is asked of a model
        without a tokenizer.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    sampling = Sampling(temperature, top_k, top_p)
    ids, stops = _encode(lm, prompts), [stop] if isinstance(stop, str) else list(stop)
    if (stops or stream) and lm.tokenizer is None:
        raise ValueError("stop and stream work on text, and this model has no tokenizer.")
    lengths = [len(row) for row in ids]
    max_len = max(lengths) + max_new_tokens
    if max_len > lm.config.max_positions:
        raise ValueError(
            f"{max(lengths)} prompt tokens + max_new_tokens={max_new_tokens} exceed the model's "
            f"{lm.config.max_positions} positions."
        )
    plan = kvc.parse(method).plan(lm.config.layout, max_len=max_len, prompt_len=max(lengths))
    dtype = cache_dtype or lm.dtype
    caches = plan.init(batch=len(ids), dtype=dtype, prompt_lens=lengths)
    logits, caches, prefill_s, prefill_compile_s = prefill(lm, ids, caches)
    state = _start(caches, logits, max_new_tokens, seed)
    state, texts, decode_s, compile_s = _decode(lm, plan, sampling, state, stops, stream)
    rows = [[int(t) for t in row if t >= 0] for row in np.asarray(state.tokens)]
    held = kvc.nbytes(state.caches)
    full = kvc.parse("full").plan(lm.config.layout, max_len=max_len)
    whole = kvc.forecast(full, np.asarray(state.caches[0].length).tolist(), dtype)
    rate = sum(map(len, rows)) / decode_s if decode_s else float("inf")
    return Generation(texts, rows, Stats(prefill_s, decode_s, prefill_compile_s + compile_s, rate, held, whole))


def prefill(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], caches: tuple[Any, ...]
) -> tuple[jax.Array, tuple[Any, ...], float, float]:
    """Read prompts into empty caches, `CHUNK` tokens a pass.

    Returns:
      Logits f32[B, V] after each row's last token, the caches, seconds of work and of compilation.
    """
    lengths = np.array([len(row) for row in prompts])
    chunk = CHUNK if lengths.max() > CHUNK else -(-int(lengths.max()) // 64) * 64
    passes = -(-int(lengths.max()) // chunk)
    tokens = np.zeros((len(prompts), passes * chunk), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    whole = jnp.asarray(lengths, jnp.int32)
    prompt = tuple(kvc.open_prompt(c, 0 if passes == 1 else passes * chunk, final=passes == 1) for c in caches)
    logits = jnp.zeros((len(prompts), lm.config.vocab_size))
    work_s = compile_s = 0.0
    for i in range(passes):
        here = jnp.asarray(tokens[:, i * chunk : (i + 1) * chunk])
        args = (lm.params, here, jnp.clip(whole - i * chunk, 0, chunk), whole, logits, prompt)
        (logits, prompt), seconds, compiling = _timed(_read_chunk, lm.model, *args)
        work_s, compile_s = work_s + seconds, compile_s + compiling
    if passes == 1:
        return logits, prompt, work_s, compile_s
    bases = tuple(p.base for p in prompt)
    rest = tuple(dataclasses.replace(p, base=None) for p in prompt)
    caches, seconds, compiling = _timed(_close, None, bases, rest)
    return logits, caches, work_s + seconds, compile_s + compiling


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def _read_chunk(
    model: Transformer,
    params: Any,
    tokens: jax.Array,
    length: jax.Array,
    whole: jax.Array,
    logits: jax.Array,
    prompt: tuple[Any, ...],
) -> tuple[jax.Array, Any]:
    """One pass over the prompts; rows that end in this chunk leave their logits."""
    last, read = model.apply(params, tokens, prompt, length, logits="last", rope_len=whole)
    return jnp.where((length > 0)[:, None], last, logits), read


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _close(_: None, bases: tuple[Any, ...], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """Compress the staged prompts; apart from `_read_chunk`, because staged tokens become no output to donate to."""
    return tuple(kvc.close_prompt(dataclasses.replace(p, base=b)) for b, p in zip(bases, rest, strict=True))


def _decode(
    lm: LanguageModel,
    plan: kvc.CachePlan,
    sampling: Sampling,
    state: _State,
    stops: list[str],
    stream: Callable[[int, str], None] | None,
) -> tuple[_State, list[str] | None, float, float]:
    """Run the loop; texts are cut at stop texts."""
    settings = (lm.model, plan.block_size, sampling, lm.config.eos_ids)
    max_new_tokens = state.tokens.shape[1]
    run, compile_s = compiled(_run, (settings,), lm.params, state, jnp.int32(0))
    watched = _Watch(lm, len(state.done), stops, stream) if stops or stream else None
    start = time.perf_counter()
    if watched is None:
        state = jax.block_until_ready(run(lm.params, state, jnp.int32(max_new_tokens)))
        seconds = time.perf_counter() - start
        ids = [[int(t) for t in row if t >= 0] for row in np.asarray(state.tokens)]
        texts = None if lm.tokenizer is None else [lm.tokenizer.decode(row) for row in ids]
        return state, texts, seconds, compile_s
    for step in range(max_new_tokens):
        state = run(lm.params, state, jnp.int32(step + 1))
        ended = watched.push(np.asarray(state.tokens[:, step]))
        if ended.any():
            state = dataclasses.replace(state, done=state.done | jnp.asarray(ended))
        if bool(state.done.all()):
            break
    return state, watched.finish(), time.perf_counter() - start, compile_s


class Stepper:
    """The decode loop alone, for measurements: a fixed number of greedy steps that nothing ends early."""

    def __init__(self, lm: LanguageModel, plan: kvc.CachePlan, num_steps: int) -> None:
        self.num_steps, self.compile_s = num_steps, 0.0
        self._lm, self._settings = lm, (lm.model, plan.block_size, Sampling(), ())

    def start(self, caches: tuple[Any, ...]) -> Any:
        """Make the loop's state from caches, which it takes over, and compile the loop once."""
        logits = jnp.zeros((caches[0].length.shape[0], self._lm.config.vocab_size))
        state = _start(caches, logits, self.num_steps, 0)
        self._program, seconds = compiled(_run, (self._settings,), self._lm.params, state, jnp.int32(0))
        self.compile_s += seconds
        return jax.block_until_ready(state)

    def run(self, state: Any) -> None:
        """Take all steps and wait for the last."""
        jax.block_until_ready(self._program(self._lm.params, state, jnp.int32(self.num_steps)))


def _start(caches: tuple[Any, ...], logits: jax.Array, max_new_tokens: int, seed: int) -> _State:
    rows = logits.shape[0]
    return _State(
        caches=caches,
        logits=logits,
        tokens=jnp.full((rows, max_new_tokens), -1, jnp.int32),
        step=jnp.int32(0),
        done=jnp.zeros(rows, bool),
        keys=jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(rows)),
        since=jnp.int32(0),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _run(settings: tuple[Any, ...], params: Any, state: _State, until: jax.Array) -> _State:
    """Generate until `until` tokens stand in every row that is not done; settle every block_size steps."""
    model, block_size, sampling, eos_ids = settings

    def going(state: _State) -> jax.Array:
        return (state.step < until) & ~state.done.all()

    def step(state: _State) -> _State:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(state.keys)
        token = jnp.where(state.done, -1, sample(sampling, keys, state.logits))
        ended = (
            (token[:, None] == jnp.asarray(eos_ids, jnp.int32)[None]).any(-1) if eos_ids else jnp.zeros_like(state.done)
        )
        done = state.done | ended
        real = jnp.where(done, 0, 1).astype(jnp.int32)  # rows that ended keep their caches as they are
        logits, caches = model.apply(params, jnp.maximum(token, 0)[:, None], state.caches, real, logits="last")
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, jnp.where(ended, -1, token)[:, None], state.step, 1)
        return dataclasses.replace(
            state, caches=caches, logits=logits, tokens=tokens, done=done, step=state.step + 1, since=state.since + 1
        )

    def block(state: _State) -> _State:
        state = lax.while_loop(lambda s: going(s) & (s.since < block_size), step, state)
        return lax.cond(state.since >= block_size, _settle, lambda s: s, state)

    return lax.while_loop(going, block, state)


def _settle(state: _State) -> _State:
    caches = tuple(kvc.settle(cache) for cache in state.caches)
    return dataclasses.replace(state, caches=caches, since=jnp.int32(0))


class _Watch:
    """Text of each row as it comes: streamed, and searched for stop texts."""

    def __init__(
        self, lm: LanguageModel, rows: int, stops: list[str], stream: Callable[[int, str], None] | None
    ) -> None:
        if lm.tokenizer is None:
            raise ValueError("stop and stream work on text, and this model has no tokenizer.")
        self._streams = [TextStream(lm.tokenizer) for _ in range(rows)]
        self._texts, self._sent, self._ended = [""] * rows, [0] * rows, np.zeros(rows, bool)
        self._stops, self._stream = stops, stream
        self._held = max(map(len, stops), default=1) - 1  # a stop text may be under way in the last characters

    def push(self, tokens: np.ndarray) -> np.ndarray:
        """Add one token a row (-1: none); return which rows have met a stop text, bool[B]."""
        for row, token in enumerate(tokens):
            if token >= 0 and not self._ended[row]:
                self._add(row, self._streams[row].push([int(token)]))
        return self._ended

    def finish(self) -> list[str]:
        """Send what was held back and return the texts."""
        for row, stream in enumerate(self._streams):
            if not self._ended[row]:
                self._add(row, stream.finish())
                self._send(row, len(self._texts[row]))
        return self._texts

    def _add(self, row: int, text: str) -> None:
        self._texts[row] += text
        found = [at for at in (self._texts[row].find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._texts[row], self._ended[row] = self._texts[row][: min(found)], True
        end = len(self._texts[row]) - (0 if found else self._held)
        self._send(row, end)

    def _send(self, row: int, end: int) -> None:
        if self._stream and end > self._sent[row]:
            self._stream(row, self._texts[row][self._sent[row] : end])
            self._sent[row] = end


def _encode(lm: LanguageModel, prompts: Any) -> list[list[int]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts = list(prompts)
    if not prompts:
        raise ValueError("no prompts given.")
    if any(isinstance(p, str) for p in prompts) and lm.tokenizer is None:
        raise ValueError("this model has no tokenizer; give prompts as lists of ids.")
    tokenizer = lm.tokenizer
    ids = [
        tokenizer.encode(p, add_special_tokens=True) if tokenizer and isinstance(p, str) else list(p) for p in prompts
    ]
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(f"prompt {i} is empty; it must have at least one token.")
        if min(row) < 0 or max(row) >= lm.config.vocab_size:
            raise ValueError(f"prompt {i} has an id outside the vocabulary of {lm.config.vocab_size}.")
    return ids


def _timed(function: Any, static: Any, *args: Any) -> tuple[Any, float, float]:
    """Call a compiled program: its result, seconds of work, seconds of compilation."""
    program, compile_s = compiled(function, (static,), *args)
    start = time.perf_counter()
    out = jax.block_until_ready(program(*args))
    return out, time.perf_counter() - start, compile_s


_programs: dict[Any, Any] = {}


def compiled(function: Any, static: tuple[Any, ...], *args: Any) -> tuple[Callable, float]:
    """The compiled program of a jitted function whose first arguments are `static`, and the seconds it took.

    One compilation for each function, static arguments and shapes; 0 seconds if it is there already.
    """
    leaves, treedef = jax.tree.flatten(args)
    key = (function, static, treedef, tuple((x.shape, x.dtype) for x in leaves))
    start = time.perf_counter()
    fresh = key not in _programs
    if fresh:
        _programs[key] = function.lower(*static, *args).compile()
    return _programs[key], time.perf_counter() - start if fresh else 0.0
