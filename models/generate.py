"""Generation: prompts in chunks, then the decode loop."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvcomp_jax as kvc
from models import decode_loop
from models.config import ModelConfig
from models.language_model import LanguageModel
from models.programs import compiled, timed
from models.rehearse import pass_tokens, rehearse
from models.sampling import Sampling
from models.transformer import Transformer
from models.watch import Watch

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
    plan = kvc.parse(method).plan(lm.layout, max_len=max_len, prompt_len=max(lengths))
    dtype = cache_dtype or lm.dtype
    caches = plan.init(batch=len(ids), dtype=dtype, prompt_lens=lengths)
    rope_len = jnp.asarray(lengths, jnp.int32) + max_new_tokens if switches(lm.config) else None
    logits, caches, prefill_s, prefill_compile_s = prefill(lm, ids, caches, rope_len)
    state = decode_loop.start(caches, logits, max_new_tokens, seed=seed, rope_len=rope_len)
    state, texts, decode_s, compile_s = _decode(lm, plan, sampling, state, stops, stream)
    rows = [[int(t) for t in row if t >= 0] for row in np.asarray(state.tokens)]
    held = kvc.nbytes(state.caches)
    full = kvc.parse("full").plan(lm.layout, max_len=max_len)
    whole = kvc.forecast(full, np.asarray(state.caches[0].length).tolist(), dtype)
    rate = sum(map(len, rows)) / decode_s if decode_s else float("inf")
    return Generation(texts, rows, Stats(prefill_s, decode_s, prefill_compile_s + compile_s, rate, held, whole))


def switches(config: ModelConfig) -> bool:
    """Whether frequencies switch at a length (longrope): a cached key keeps its angle, so all go by the final one."""
    return any(rope is not None and rope.kind == "longrope" for rope in config.ropes)


def prefill(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    caches: tuple[Any, ...],
    rope_len: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Any, ...], float, float]:
    """Read prompts into empty caches, `CHUNK` tokens a pass, or in one if layers hand on a part of them.

    Args:
      lm: The model.
      prompts: Ids of each row.
      caches: Empty, one a layer.
      rope_len: i32[B], see `Transformer`; None is each prompt's length.

    Returns:
      Logits f32[B, V] after each row's last token, the caches, seconds of work and of compilation.
    """
    lengths = np.array([len(row) for row in prompts])
    hands_on = any(cache.spec.policy.hands_on for cache in caches)
    chunk = CHUNK if lengths.max() > CHUNK and not hands_on else -(-int(lengths.max()) // 64) * 64
    passes = -(-int(lengths.max()) // chunk)
    tokens = np.zeros((len(prompts), passes * chunk), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    whole = jnp.asarray(lengths, jnp.int32)
    rope_len = whole if rope_len is None else rope_len
    extra = pass_tokens(lm, caches, int(lengths.max()))
    prompt, bases = _open(lm, caches, 0 if hands_on else passes * chunk + extra)
    logits = jnp.zeros((len(prompts), lm.config.vocab_size))
    work_s = compile_s = 0.0
    for i in range(passes):
        here = jnp.asarray(tokens[:, i * chunk : (i + 1) * chunk])
        args = (lm.params, here, jnp.clip(whole - i * chunk, 0, chunk), rope_len, logits, prompt)
        (logits, prompt), seconds, compiling = timed(_read_chunk, lm.model, *args)
        work_s, compile_s = work_s + seconds, compile_s + compiling
    if not bases:
        return logits, prompt, work_s, compile_s
    stats: tuple[Any, ...] = (None,) * len(caches)
    if extra:
        stats, seconds, compiling = rehearse(lm, prompts, caches, prompt, rope_len)
        work_s, compile_s = work_s + seconds, compile_s + compiling
    staged: list[kvc.PromptCache] = list(prompt)
    closed: tuple[kvc.LayerCache, ...] = ()
    del prompt  # each layer's staged tokens are freed when it closes
    for base, stat in zip(bases, stats, strict=True):
        cache, seconds, compiling = timed(_close, None, base, staged.pop(0), stat)
        closed, work_s, compile_s = (*closed, cache), work_s + seconds, compile_s + compiling
    return logits, closed, work_s, compile_s


def _open(
    lm: LanguageModel, caches: tuple[Any, ...], capacity: int
) -> tuple[tuple[kvc.PromptCache, ...], tuple[kvc.LayerCache, ...]]:
    """Prompts to read chunks with, and the caches that were detached from them.

    `capacity` 0, if layers hand on what the next one sees: then nothing is detached, and they close by themselves.
    """
    heads = lm.config.num_heads
    prompts = tuple(kvc.open_prompt(cache, capacity, num_heads=heads) for cache in caches)
    if not capacity:
        return prompts, ()
    bases, prompts = zip(*map(kvc.detach, prompts), strict=True)
    return prompts, bases


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def _read_chunk(
    model: Transformer,
    params: Any,
    tokens: jax.Array,
    length: jax.Array,
    rope_len: jax.Array,
    logits: jax.Array,
    prompt: tuple[Any, ...],
) -> tuple[jax.Array, Any]:
    """One pass over the prompts; rows that end in this chunk leave their logits."""
    last, read = model.apply(params, tokens, prompt, length, logits="last", rope_len=rope_len)
    return jnp.where((length > 0)[:, None], last, logits), read


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _close(_: None, base: kvc.LayerCache, prompt: kvc.PromptCache, stat: jax.Array | None) -> kvc.LayerCache:
    """Compress a layer's staged prompt: layers that are alike share the program.

    Apart from `_read_chunk`, which all methods share, and because staged tokens become no output to donate to.
    """
    return kvc.close_prompt(prompt, base, stat=stat)


def _decode(
    lm: LanguageModel,
    plan: kvc.CachePlan,
    sampling: Sampling,
    state: decode_loop.State,
    stops: list[str],
    stream: Callable[[int, str], None] | None,
) -> tuple[decode_loop.State, list[str] | None, float, float]:
    """Run the loop; texts are cut at stop texts."""
    settings = (lm.model, plan.block_size, sampling, lm.config.eos_ids)
    max_new_tokens = state.tokens.shape[1]
    run, compile_s = compiled(decode_loop.run, (settings,), lm.params, state, jnp.int32(0))
    watched = Watch(lm, len(state.done), stops, stream) if stops or stream else None
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
