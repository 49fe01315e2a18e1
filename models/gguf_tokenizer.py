"""Tokenizers from GGUF metadata: byte-level BPE by its pre-tokenizer's name, SentencePiece BPE by its scores."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from models.errors import CheckpointError
from models.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _GPT4.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclasses.dataclass(frozen=True)
class _ByteLevel:
    """What `tokenizer.ggml.pre` stands for.

    `whole_words`: a word of the text that is a token is taken whole, whatever the merges say.
    """

    split: Callable[[], Any]
    bos: bool = False
    whole_words: bool = False
    nfc: bool = False


def read(fields: Mapping[str, Any]) -> Tokenizer | None:
    """Build the tokenizer; None if the file has none.

    Raises:
      CheckpointError: If its kind is not known.
    """
    kind = fields.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in _KINDS:
        raise CheckpointError(f"tokenizer.ggml.model={kind!r} is not supported; supported: {', '.join(_KINDS)}.")
    tokens = fields["tokenizer.ggml.tokens"]
    inner, bos_by_default = _KINDS[kind](fields, tokens)
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [(t, kind) for t, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    inner.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in added])
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    begin = fields.get("tokenizer.ggml.add_bos_token", bos_by_default)
    end = fields.get("tokenizer.ggml.add_eos_token", False)
    _surround(inner, special.get("bos_token") if begin else None, special.get("eos_token") if end else None)
    return Tokenizer(inner, fields.get("tokenizer.chat_template"), special)


def _surround(inner: tokenizers.Tokenizer, begin: str | None, end: str | None) -> None:
    """Let `add_special_tokens` put these around a text."""
    around = [token for token in (begin, end) if token is not None]
    if around:
        single = [*([begin] if begin else []), "$A", *([end] if end else [])]
        ids = [(token, inner.token_to_id(token)) for token in around]
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _split(pattern: str) -> Callable[[], Any]:
    def make() -> Any:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return make


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_then_gpt2() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_LLAMA3 = _ByteLevel(_split(_GPT4), bos=True, whole_words=True)
_PRE_TOKENIZERS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "mpt", "olmo"), _ByteLevel(_gpt2)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _ByteLevel(_digits_then_gpt2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _ByteLevel(_split(_GPT4))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _ByteLevel(_split(_QWEN2), nfc=True)),
}


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """GPT-2's byte-level BPE with the pre-tokenizer that the file names, and whether it begins texts with bos."""
    kind = fields.get("tokenizer.ggml.pre", "default")
    if kind not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise CheckpointError(f"tokenizer.ggml.pre={kind!r} is not supported; supported: {known}.")
    chosen = _PRE_TOKENIZERS[kind]
    merges = [_pair(merge) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=chosen.whole_words))
    if chosen.nfc:
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer, inner.decoder = chosen.split(), decoders.ByteLevel()
    return inner, chosen.bos


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
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
    return inner, True


def _merges(tokens: Sequence[str], vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Pairs that make up a token, by the ids of their parts."""
    for token in tokens:
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        held = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        yield from sorted(held, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
