"""Text to ids and back, over the `tokenizers` library, from a Hugging Face folder or GGUF metadata."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from models.errors import CheckpointError
from models.hf import read_json

_DIGITS_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS_1 = _DIGITS_3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its chat template."""

    inner: tokenizers.Tokenizer
    chat_template: str | None = None
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)  # bos_token, eos_token … for the template

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """Read tokenizer.json and what stands beside it; None if the folder has none.

        Raises:
          CheckpointError: If tokenizer.json is damaged.
        """
        file = folder / "tokenizer.json"
        if not file.exists():
            return None
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        template = config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(inner, template, _special(config))

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "Tokenizer":
        """Build from GGUF metadata.

        Raises:
          CheckpointError: If the kind of tokenizer is not known.
        """
        kind = fields.get("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama"):
            raise CheckpointError(f"tokenizer.ggml.model={kind!r} is not supported; supported: gpt2, llama.")
        tokens = fields["tokenizer.ggml.tokens"]
        inner = _byte_level(fields, tokens) if kind == "gpt2" else _sentencepiece(fields, tokens)
        types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        for token, token_type in zip(tokens, types, strict=True):
            if token_type in (3, 4):  # control, user defined
                inner.add_tokens([AddedToken(token, special=token_type == 3, normalized=False)])
        special = {
            f"{name}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
            for name in ("bos", "eos")
            if f"tokenizer.ggml.{name}_token_id" in fields
        }
        return cls(inner, fields.get("tokenizer.chat_template"), special)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Undo `to_json`."""
        values = json.loads(text)
        return cls(tokenizers.Tokenizer.from_str(values["tokenizer"]), values["chat_template"], values["special"])

    def to_json(self) -> str:
        """All of it as one string."""
        special = dict(self.special)
        return json.dumps({"tokenizer": self.inner.to_str(), "chat_template": self.chat_template, "special": special})

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; special tokens written in it are recognised, none are added unless asked for."""
        return self.inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self.inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def largest_id(self) -> int:
        """Largest id it can give."""
        return max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Render messages, each with "role" and "content", as the model was trained to read them.

        Raises:
          ValueError: If there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; pass plain text.")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda x, **kwargs: json.dumps(x, ensure_ascii=False, **kwargs)
        try:
            return environment.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error


class TextStream:
    """Turn ids that come one by one into text that is final: characters of several tokens are held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._ids, self._start, self._sent = tokenizer, [], 0, ""

    def push(self, ids: Sequence[int]) -> str:
        """Add ids and return the text that they complete."""
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\ufffd") or not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        if new.endswith("\n"):  # a safe place to forget the past
            self._start, self._sent = len(self._ids), ""
        return new

    def finish(self) -> str:
        """Return what was held back."""
        return self._tokenizer.decode(self._ids[self._start :])[len(self._sent) :]


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token is not None:
            found[name] = token
    return found


def _split(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits_then_bytes() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


_PRE_TOKENIZERS = {
    "smollm": _digits_then_bytes,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "default": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _split(_DIGITS_3),
    "llama3": lambda: _split(_DIGITS_3),
    "qwen2": lambda: _split(_DIGITS_1),
}


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE with the pre-tokenizer that the file names."""
    kind = fields.get("tokenizer.ggml.pre", "default")
    if kind not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise CheckpointError(f"tokenizer.ggml.pre={kind!r} is not supported; supported: {known}.")
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    inner = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = _PRE_TOKENIZERS[kind]()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: merges follow from the scores, unknown characters fall back to bytes."""
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = fields["tokenizer.ggml.scores"]
    merges = sorted(_merges(tokens, vocab), key=lambda pair: -scores[vocab[pair[0] + pair[1]]])
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    inner.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def _merges(tokens: Sequence[str], vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for token in tokens:
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                yield token[:cut], token[cut:]
