"""Questions about a long context whose answers stand in it once, or have to be gathered from all of it.

Made offline from any text: its sentences are the hay, its words the keys. The forms are those of needle in a haystack
(Kamradt 2023) and of RULER (Hsieh et al. 2024, arXiv:2404.06654, appendix B), cut to what fits a small model and a
short context: completions instead of chats, a short chain of variables, few common words in a list without numbers.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from models import Tokenizer

_KEYS = 4  # needles of the tasks with several
_HOPS = 2  # assignments after the first
_COMMON = 4  # words that are common
_ROOM = 4  # tokens of an answer beside its own: spaces, a full stop


@dataclasses.dataclass(frozen=True)
class Case:
    """A context of `length` tokens, the question that follows it, and what the answer must name."""

    task: str
    length: int
    depth: float | None  # of what is asked for: 0 at the beginning, 1 at the end; None if it stands in several places
    context: tuple[int, ...]
    question: tuple[int, ...]
    answers: tuple[str, ...]
    max_new_tokens: int

    def score(self, text: str) -> float:
        """Share of the answers that stand in a text as whole words."""
        return sum(re.search(rf"\b{re.escape(x)}\b", text) is not None for x in self.answers) / len(self.answers)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a task asks and where it hides the answer."""

    needles: Sequence[str]
    depths: Sequence[float]
    question: str
    answers: Sequence[str]
    depth: float | None = None


class Source:
    """A text as hay and keys."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self.sentences = [" " + " ".join(x.split()) for x in re.findall(r"[^.!?]+[.!?]+", text)]
        self.words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text.lower())))
        self._tokenizer = tokenizer
        if len(self.sentences) < 2 or len(self.words) < 20:
            raise ValueError(
                f"the text has {len(self.sentences)} sentences and {len(self.words)} words of 4 to 9 letters; "
                "2 and 20 are needed: take a longer text."
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text."""
        return self._tokenizer.encode(text)

    def hay(self, rng: np.random.Generator, num_tokens: int) -> list[list[int]]:
        """Sentences in a row from a random place, `num_tokens` together; the first lacks its beginning."""
        start, found, total = int(rng.integers(len(self.sentences))), [], 0
        for i in itertools.count(start):
            if total >= num_tokens:
                break
            found.append(self.encode(self.sentences[i % len(self.sentences)]))
            total += len(found[-1])
        cut = total - num_tokens
        while found and cut:
            first = found.pop(0)
            if len(first) > cut:
                found.insert(0, first[cut:])
            cut = max(cut - len(first), 0)
        return found

    def draw(self, rng: np.random.Generator, num: int) -> list[str]:
        """Different words."""
        return [str(word) for word in rng.choice(self.words, num, replace=False)]


def make_cases(
    source: Source, tasks: Sequence[str], *, length: int, cases: int, depths: int, whole: bool, seed: int
) -> list[Case]:
    """Make `cases` of each task, what they ask for at `depths` places in turn; the same for every method.

    `whole` counts the question among the `length` tokens.

    Raises:
      ValueError: If a task is unknown or does not fit into `length` tokens.
    """
    made = []
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}.")
        for i in range(cases):
            rng = np.random.default_rng((seed, length, list(TASKS).index(task), i))
            depth = (i % depths) / (depths - 1) if depths > 1 else 0.5
            made.append(_case(source, task, rng, length, depth, whole))
    return made


def _case(source: Source, task: str, rng: np.random.Generator, length: int, depth: float, whole: bool) -> Case:
    parts = TASKS[task](source, rng, depth, length)
    question = source.encode(parts.question)
    room = length - len(question) if whole else length
    needles = [source.encode(text) for text in parts.needles]
    hay = room - sum(map(len, needles))
    if hay < 0:
        raise ValueError(f"task {task} does not fit into length={length} tokens; take a longer one.")
    return Case(
        task=task,
        length=length,
        depth=parts.depth,
        context=tuple(_hide(source.hay(rng, hay), needles, parts.depths)),
        question=tuple(question),
        answers=tuple(parts.answers),
        max_new_tokens=sum(len(source.encode(f" {answer}")) + _ROOM for answer in parts.answers),
    )


def _hide(hay: list[list[int]], needles: list[list[int]], depths: Sequence[float]) -> list[int]:
    """Put needles between sentences, each as near to its depth as one ends; equal depths keep their order."""
    ends = np.cumsum([0, *map(len, hay)])
    places = [int(np.abs(ends - depth * ends[-1]).argmin()) for depth in depths]
    pieces = []
    for i in range(len(hay) + 1):
        pieces += [needle for needle, place in zip(needles, places, strict=True) if place == i]
        pieces += hay[i : i + 1]
    return list(itertools.chain.from_iterable(pieces))


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


def _magic(key: str, number: str) -> str:
    return f" One of the special magic numbers for {key} is: {number}."


def _needle(source: Source, rng: np.random.Generator, depth: float, length: int) -> Parts:
    """One number in a haystack."""
    return _one_of(source, rng, depth, 1)


def _multi_key(source: Source, rng: np.random.Generator, depth: float, length: int) -> Parts:
    """One number among those of other keys."""
    return _one_of(source, rng, depth, _KEYS)


def _one_of(source: Source, rng: np.random.Generator, depth: float, num: int) -> Parts:
    keys, numbers = source.draw(rng, num), [_number(rng) for _ in range(num)]
    return Parts(
        needles=[_magic(key, number) for key, number in zip(keys, numbers, strict=True)],
        depths=[depth, *rng.random(num - 1)],
        question=f"\n\nOne of the special magic numbers for {keys[0]} is:",
        answers=numbers[:1],
        depth=depth,
    )


def _multi_query(source: Source, rng: np.random.Generator, depth: float, length: int) -> Parts:
    """All numbers in one answer."""
    keys, numbers = source.draw(rng, _KEYS), [_number(rng) for _ in range(_KEYS)]
    listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
    return Parts(
        needles=[_magic(key, number) for key, number in zip(keys, numbers, strict=True)],
        depths=rng.random(_KEYS).tolist(),
        question=f"\n\nThe special magic numbers for {listed} mentioned in the provided text are:",
        answers=numbers,
    )


def _key_value_lines(source: Source, rng: np.random.Generator, depth: float, length: int) -> Parts:
    """One line among lines of the same form, nothing else."""
    lines: list[str] = []
    keys, left = source.draw(rng, min(length, len(source.words))), length
    for key in keys:
        line = f"\n{key}: {_number(rng)}"
        left -= len(source.encode(line))
        if left < 16:  # tokens that a question may take
            break
        lines.append(line)
    asked = round(depth * (len(lines) - 1))
    key, number = lines[asked].strip().split(": ")
    return Parts(needles=lines, depths=[1.0] * len(lines), question=f"\n\n{key}:", answers=[number], depth=depth)


def _variable_tracking(source: Source, rng: np.random.Generator, depth: float, length: int) -> Parts:
    """Every variable that has a value, through assignments to others."""
    names = ["".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 3)) for _ in range(_HOPS + 1)]
    number = _number(rng)
    chain = [f" VAR {names[0]} = {number}.", *(f" VAR {b} = VAR {a}." for a, b in itertools.pairwise(names))]
    question = (
        f"\n\nQuestion: Find all variables that are assigned the value {number} in the text above.\nAnswer: According "
        f"to the chain of variable assignment in the text above, {len(names)} variables are assigned the value "
        f"{number}, they are: VAR"
    )
    return Parts(needles=chain, depths=np.sort(rng.random(len(chain))).tolist(), question=question, answers=names)


def _common_words(source: Source, rng: np.random.Generator, depth: float, length: int) -> Parts:
    """The words that come most often in a list: half of it are `_COMMON` words, the others come once."""
    question = (
        f"\n\nQuestion: What are the {_COMMON} most common words in the above list?\nAnswer: The {_COMMON} words "
    )
    question += "that appear most often in the list are:"
    drawn, items, left = source.draw(rng, min(length, len(source.words))), [], length - len(source.encode(question))
    common, others = drawn[:_COMMON], drawn[_COMMON:]
    for i, other in enumerate(others):
        pair = [f" {common[i % _COMMON]},", f" {other},"]
        left -= sum(len(source.encode(word)) for word in pair)
        if left < 0:
            break
        items += pair
    rng.shuffle(items)
    return Parts(needles=items, depths=[1.0] * len(items), question=question, answers=common)


TASKS: dict[str, Callable[[Source, np.random.Generator, float, int], Parts]] = {
    "needle": _needle,
    "key_value_lines": _key_value_lines,
    "multi_key": _multi_key,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
}
