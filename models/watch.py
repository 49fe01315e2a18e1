"""Text of generated rows as it comes: streamed, and searched for stop texts."""

from collections.abc import Callable

import numpy as np

from models.language_model import LanguageModel
from models.tokenizer import TextStream


class Watch:
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
