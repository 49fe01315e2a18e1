"""Text to ids and back, over the `tokenizers` library."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import CheckpointError
from models.hf import read_json

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_PLACEHOLDERS = {"<image_soft_token>"}  # Gemma 3 reserves an id past its text vocabulary for images


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
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            config |= read_json(folder / name) if (folder / name).exists() else {}
        template = config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(inner, template, _special(config))

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
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.inner.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """Id that begins a text, if there is one."""
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id that ends a text, if there is one."""
        return self._id("eos_token")

    @property
    def largest_id(self) -> int:
        """Largest id that it gives to a text, placeholders of other inputs aside."""
        vocab = self.inner.get_vocab(with_added_tokens=True)
        return max((i for token, i in vocab.items() if token not in _PLACEHOLDERS), default=-1)

    def _id(self, name: str) -> int | None:
        return self.inner.token_to_id(self.special[name]) if name in self.special else None

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Render messages, each with "role" and "content", as the model was trained to read them.

        Raises:
          ValueError: If there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; pass plain text.")
        try:
            return (
                _environment()
                .from_string(self.chat_template)
                .render(messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special)
            )
        except (TemplateError, TypeError, OverflowError) as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error


class TextStream:
    """Turn ids that come one by one into text that is final: characters of several tokens are held back.

    What comes is decoded behind the tokens of the piece before it, because a decoder may treat a text's first token
    apart. The pieces and what `finish` returns make up the text of all ids, but for bytes that are no UTF-8, which some
    decoders replace together with the good ones before them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        self._known = 0  # leading ids whose text is out

    def push(self, ids: Sequence[int]) -> str:
        """Add ids and return the text that they complete."""
        self._ids.extend(ids)
        new = self._pending()
        if not new or new.endswith("\ufffd"):  # nothing yet, or part of a character
            return ""
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        return new

    def finish(self) -> str:
        """Return what was held back."""
        return self._pending()

    def _pending(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._known])) :]


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: their code reaches nothing but the messages."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda x, **kwargs: json.dumps(x, ensure_ascii=False, **kwargs)
    return environment


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL:
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token is not None:
            found[name] = token
    return found
