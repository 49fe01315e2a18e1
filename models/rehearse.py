"""Reading a prompt a second time, to see which of its tokens the model needs to repeat it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvcomp_jax as kvc
from models.language_model import LanguageModel
from models.programs import timed
from models.transformer import Transformer


def pass_tokens(lm: LanguageModel, caches: Sequence[kvc.LayerCache], longest: int) -> int:
    """Tokens of one pass over a rehearsal, instruction included; 0 if no layer's policy rehearses."""
    policy = _policy(caches)
    return 0 if policy is None else len(_instruction(lm, policy)) + min(policy.chunk, -(-longest // 64) * 64)


def rehearse(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    caches: Sequence[kvc.LayerCache],
    prompts: tuple[kvc.PromptCache, ...],
    rope_len: jax.Array,
) -> tuple[tuple[jax.Array | None, ...], float, float]:
    """Make the model repeat prompts that it has read, chunk by chunk, each after the instruction.

    Args:
      lm: The model.
      rows: Ids of each row's prompt.
      caches: That the prompts will be put into; one of their policies rehearses.
      prompts: All tokens staged, with room for `pass_tokens` more.
      rope_len: i32[B], see `Transformer`.

    Returns:
      For each layer the greatest attention that every token of the prompt received, f32[B, K, S], None where its policy
      does not rehearse; seconds of work and of compilation.

    Raises:
      ValueError: If a prompt and a pass together exceed the model's positions, or the instruction is too long.
    """
    policy = _policy(caches)
    begin, longest = _instruction(lm, policy), max(map(len, rows))
    size = pass_tokens(lm, caches, longest)
    if longest + size > lm.config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and a rehearsal of {size} exceed the model's {lm.config.max_positions} "
            f"positions; take a shorter chunk than {policy.chunk}."
        )
    if len(begin) > policy.most_instruction:
        raise ValueError(f"an instruction of {len(begin)} tokens exceeds {policy.most_instruction}; shorten it.")
    chunk = size - len(begin)
    scores = tuple(None if p.policy is None or not p.policy.rehearses else _zeros(p) for p in prompts)
    work_s = compile_s = 0.0
    for start in range(0, longest, chunk):
        tokens, lengths = np.zeros((len(rows), size), np.int32), np.zeros(len(rows), np.int32)
        for i, ids in enumerate(rows):
            part = list(ids[start : start + chunk])
            again = [*begin, *part] if part else []
            tokens[i, : len(again)], lengths[i] = again, len(again)
        args = (lm.params, jnp.asarray(tokens), jnp.asarray(lengths), rope_len, prompts, scores)
        scores, seconds, compiling = timed(_pass, lm.model, *args)
        work_s, compile_s = work_s + seconds, compile_s + compiling
    return scores, work_s, compile_s


@functools.partial(jax.jit, static_argnums=0)
def _pass(
    model: Transformer,
    params: Any,
    tokens: jax.Array,
    length: jax.Array,
    rope_len: jax.Array,
    prompts: tuple[kvc.PromptCache, ...],
    scores: tuple[jax.Array | None, ...],
) -> tuple[jax.Array | None, ...]:
    """Scores after one more pass; the prompts themselves stay as they are."""
    _, read = model.apply(params, tokens, prompts, length, logits="none", rope_len=rope_len)
    return tuple(
        None if score is None else jnp.maximum(score, kvc.peak_attention(after, before.filled))
        for score, before, after in zip(scores, prompts, read, strict=True)
    )


def _policy(caches: Sequence[kvc.LayerCache]) -> Any:
    return next((cache.spec.policy for cache in caches if cache.spec.policy.rehearses), None)


def _instruction(lm: LanguageModel, policy: Any) -> list[int]:
    """Ids of the instruction; none for a model without a tokenizer."""
    return [] if lm.tokenizer is None else lm.tokenizer.encode(policy.instruction)


def _zeros(prompt: kvc.PromptCache) -> jax.Array:
    return jnp.zeros(prompt.staged.k.shape[:3]) if prompt.staged is not None else jnp.zeros(0)
