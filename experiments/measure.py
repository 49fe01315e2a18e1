"""Measuring one method: quality window by window, bytes, and speed in turn with the full cache."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvcomp_jax as kvc
import models
from experiments.protocol import Score, judge, score_chunk, score_stream
from models.decode_loop import Stepper
from models.generate import prefill
from models.programs import compiled


def saves(held: kvc.Bytes, full: kvc.Bytes) -> bool:
    """Whether a cache may be called compressed: below the full one by more than the 1 % that counters can make up."""
    return held.used < 0.99 * full.used


def read_by(cache: kvc.LayerCache, num_heads: int) -> str:
    """What reads a layer's rungs in a decode step, e.g. "quantized_decode / cpu"."""
    used = kvc.kernels_in_use(cache, num_heads=num_heads)
    return ", ".join(dict.fromkeys(f"{tier.operation} / {tier.backend}" for tier in used)) or "exact window"


class Bench:
    """A model, its windows of text, and the full cache's logits on them as the reference."""

    def __init__(self, lm: models.LanguageModel, config: Any, windows: np.ndarray) -> None:
        self.lm, self.config, self.windows = lm, config, windows
        self.dtype = jnp.dtype(config.cache_dtype) if config.cache_dtype else lm.dtype
        self._reference: list[np.ndarray] = []  # f32[score - 1, V] each: 50 MB at 49,152 entries and 256 tokens
        self._full: tuple[tuple[Any, ...], Stepper] | None = None
        self._full_row: tuple[list[Score], dict[str, Any]] | None = None
        self.full_bytes = kvc.Bytes(0, 0, 0)

    def prepare_reference(self, advance: Callable[[], None]) -> None:
        """Score every window with the full cache and keep the logits."""
        self._full_row = self._score("full", advance)
        self.full_bytes = self._full_row[1]["bytes"]

    def measure(self, method: str, advance: Callable[[], None]) -> tuple[list[Score], dict[str, Any]]:
        """Scores of every window, and bytes, seconds and tokens a second."""
        if method == "full" and self._full_row is not None:
            scores, row = self._full_row
            for _ in self.windows:
                advance()
        else:
            scores, row = self._score(method, advance)
        caches, stepper = row.pop("held")
        if method == "full":
            self._full = (caches, stepper)
        rates, full_rates, moved = self._rates(caches, stepper)
        row["compile_s"] += stepper.compile_s
        if moved.wanted:
            row["recall_hit_rate"] = 1 - moved.recalled / moved.wanted
            row["recall_bytes_per_step"] = moved.bytes / stepper.num_steps
        return scores, {
            **row,
            "decode_tokens_per_s": statistics.median(rates),
            "decode_tokens_per_s_range": [min(rates), max(rates)],
            "decode_vs_full": statistics.median(rates) / statistics.median(full_rates),
        }

    def _score(self, method: str, advance: Callable[[], None]) -> tuple[list[Score], dict[str, Any]]:
        config, lm = self.config, self.lm
        plan = kvc.parse(method).plan(lm.layout, max_len=config.context + config.score, prompt_len=config.context)
        scores, seconds, compile_s, caches = [], [], 0.0, ()
        for i, window in enumerate(self.windows):
            prompt, rest = window[: config.context], jnp.asarray(window[config.context :])
            empty = plan.init(batch=1, dtype=self.dtype, prompt_lens=[config.context])
            _, caches, prefill_s, prefill_compile_s = prefill(lm, [prompt.tolist()], empty)
            if config.stream:
                program, score_compile_s = compiled(score_stream, (lm.model, plan.block_size), lm.params, rest, caches)
            else:
                program, score_compile_s = compiled(score_chunk, (lm.model,), lm.params, rest, caches)
            logits = program(lm.params, rest, caches)
            if len(self._reference) <= i:  # the first method is the full cache
                self._reference.append(np.asarray(logits))
            scores.append(judge(jnp.asarray(self._reference[i]), logits, window[config.context + 1 :]))
            seconds.append(prefill_s)
            compile_s += prefill_compile_s + score_compile_s
            advance()
        stepper = Stepper(lm, plan, self.config.decode_steps)
        row = {
            "bytes": kvc.nbytes(caches),
            "kernel": read_by(caches[0], lm.config.num_heads),
            "prefill_s": statistics.median(seconds),
            "prefill_s_range": [min(seconds), max(seconds)],
            "compile_s": compile_s,
            "held": (caches, stepper),
        }
        return scores, row

    def _rates(self, caches: tuple[Any, ...], stepper: Stepper) -> tuple[list[float], list[float], kvc.Recalls]:
        """Tokens a second of a method and of the full cache, measured in turn, and what one measurement recalled."""
        if self._full is None:
            if self._full_row is None:
                raise RuntimeError("prepare_reference comes first")
            self._full = self._full_row[1]["held"]
        rates, full_rates = [], []
        for _ in range(self.config.repeats):
            rate, moved = _rate(caches, stepper)
            rates.append(rate)
            full_rates.append(rate if self._full[1] is stepper else _rate(*self._full)[0])
        return rates, full_rates, moved


def _rate(caches: tuple[Any, ...], stepper: Stepper) -> tuple[float, kvc.Recalls]:
    """Tokens a second of the decode loop on top of caches, and what it recalled."""
    state = stepper.start(jax.tree.map(jnp.copy, caches))  # the loop takes its caches over
    start = time.perf_counter()
    state = stepper.run(state)
    return stepper.num_steps / (time.perf_counter() - start), kvc.recalls(state.caches)
