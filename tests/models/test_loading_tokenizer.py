"""Tokenizers from folders and from GGUF metadata, chat templates, and text that comes token by token."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers

import models
from models import CheckpointError, Tokenizer, gguf_tokenizer
from models.tokenizer import TextStream
from tests.models.files import GOLDEN, read, to_gguf, write

TEXT = "It isn't 1234 o'clock,  WE'LL see:\n\n  naïve café — 東京 🙂 x=½\t(ok)\r\n don't"
LLAMA3 = (  # as in the tokenizer.json of Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(split=None) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)


def _regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), _bytes(pattern)])


PRE = {
    "gpt-2": _bytes(),
    "default": _bytes(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes()]),
    "llama-bpe": _regex(LLAMA3),
    "qwen2": _regex(LLAMA3.replace("{1,3}", "")),
}


def trained(pre: str = "gpt-2") -> tokenizers.Tokenizer:
    """A byte-level BPE of 300 tokens and two special ones."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer, inner.decoder = PRE[pre], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [TEXT] * 4, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_special_tokens(["<s>", "</s>"])
    return inner


def metadata(inner: tokenizers.Tokenizer, pre: str) -> dict:
    """What a GGUF file says of a byte-level BPE."""
    model = json.loads(inner.to_str())["model"]
    tokens = [inner.id_to_token(i) for i in range(inner.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in ("<s>", "</s>") else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_tokenizers_from_metadata(pre):
    inner = trained(pre)
    tokenizer = gguf_tokenizer.read(metadata(inner, pre))
    text = TEXT + "</s>ab<s>"
    assert tokenizer.encode(text) == inner.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.bos_id, tokenizer.eos_id) == (inner.token_to_id("<s>"), inner.token_to_id("</s>"))
    assert tokenizer.vocab_size == inner.get_vocab_size()
    begins = tokenizer.encode("ab", add_special_tokens=True)[0] == tokenizer.bos_id
    assert begins == (pre == "llama-bpe")


def test_metadata_decides_what_surrounds_a_text():
    values = metadata(trained(), "gpt-2") | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = gguf_tokenizer.read(values)
    ids = tokenizer.encode("ab")
    assert tokenizer.encode("ab", add_special_tokens=True) == [tokenizer.bos_id, *ids, tokenizer.eos_id]


def test_whole_words_go_before_merges():
    """Llama 3 takes a word that is a token as it is, although no merges lead to it."""
    values = metadata(trained("llama-bpe"), "llama-bpe")
    values["tokenizer.ggml.tokens"] = [*values["tokenizer.ggml.tokens"], "zqxj"]
    values["tokenizer.ggml.token_type"] = [*values["tokenizer.ggml.token_type"], 1]
    assert gguf_tokenizer.read(values).encode("zqxj") == [len(values["tokenizer.ggml.tokens"]) - 1]
    assert len(gguf_tokenizer.read(values | {"tokenizer.ggml.pre": "gpt-2"}).encode("zqxj")) > 1


PIECES = {  # token -> score; SentencePiece joins the pair whose result scores highest
    "<unk>": 0,
    "<s>": 0,
    "</s>": 0,
    **{f"<0x{i:02X}>": 0 for i in range(256)},
    "he": -1,
    "ll": -2,
    "▁w": -3,
    "llo": -4,
    "hell": -5,
    "or": -6,
    "hello": -7,
    "▁wor": -8,
    "▁hello": -9,
    **dict.fromkeys("▁helowrd", -20),
}


def sentencepiece(**more) -> Tokenizer:
    """A tokenizer from scores."""
    tokens = list(PIECES)
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(score) for score in PIECES.values()],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return gguf_tokenizer.read(values | {f"tokenizer.ggml.{key}": value for key, value in more.items()})


def test_sentencepiece_tokenizers_from_scores():
    tokenizer, tokens = sentencepiece(), list(PIECES)

    def pieces(text: str) -> list[str]:
        return [tokens[i] for i in tokenizer.encode(text)]

    # h e l l o: "he" (-1), "ll" (-2), "llo" (-4) before "hell" (-5), then "hello" (-7)
    assert pieces("hello world") == ["▁hello", "▁wor", "l", "d"]
    assert pieces("hell") == ["▁", "hell"]
    assert pieces("é\n") == ["▁", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert tokenizer.encode("hello", add_special_tokens=True)[0] == 1
    for text in ("hello world", " hello", "é 東\nhello  world"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    bare = sentencepiece(add_space_prefix=False, add_bos_token=False)
    assert [tokens[i] for i in bare.encode("hello", add_special_tokens=True)] == ["hello"]
    assert bare.decode(bare.encode(" hello")) == " hello"


def test_unknown_kinds_of_tokenizer():
    values = metadata(trained(), "gpt-2")
    with pytest.raises(CheckpointError, match="model='bert' is not supported; supported: gpt2, llama"):
        gguf_tokenizer.read({"tokenizer.ggml.model": "bert"})
    with pytest.raises(CheckpointError, match=r"pre='tekken' is not supported; supported: .*qwen2"):
        gguf_tokenizer.read(values | {"tokenizer.ggml.pre": "tekken"})
    assert gguf_tokenizer.read({"tokenizer.ggml.model": "none"}) is None


def test_tokenizer_inside_a_gguf_file(tmp_path):
    inner = trained()
    values = metadata(inner, "gpt-2")

    def add(writer) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(values["tokenizer.ggml.tokens"])
        writer.add_token_types(values["tokenizer.ggml.token_type"])
        writer.add_token_merges(values["tokenizer.ggml.merges"])
        writer.add_chat_template(values["tokenizer.chat_template"])

    config, tensors = read("llama")
    config |= {"vocab_size": inner.get_vocab_size()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.zeros((inner.get_vocab_size(), 64), np.float32)
    lm = models.load(to_gguf(tmp_path / "m.gguf", "llama", config, tensors, more=add))
    assert lm.tokenizer.encode(TEXT) == inner.encode(TEXT).ids
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = np.zeros((290, 64), np.float32)
    with pytest.raises(CheckpointError, match=r"short\.gguf: the tokenizer has id \d+, the vocabulary only 290"):
        models.load(to_gguf(tmp_path / "short.gguf", "llama", config, tensors, more=add))


def folder(path, template: str | None = "config", **config):
    """A folder with a tokenizer whose template prints roles."""
    trained().save(str(path / "tokenizer.json"))
    text = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    text += "{% if add_generation_prompt %}[assistant]{% endif %}"
    if template == "config":
        config["chat_template"] = text
    elif template == "list":
        config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
    elif template == "file":
        (path / "chat_template.jinja").write_text(text)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("template", ["config", "list", "file"])
def test_chat_templates_of_folders(tmp_path, template):
    eos = {"content": "</s>", "lstrip": False}
    tokenizer = Tokenizer.from_folder(folder(tmp_path, template, eos_token=eos, bos_token="<s>"))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "[user]hi</s>[assistant]"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == "[user]hi</s>"
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id) == (300, 301)


def test_special_tokens_of_an_older_folder(tmp_path):
    folder(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert Tokenizer.from_folder(tmp_path).eos_id == 301


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0].content.missing.further }}",
        "{% for %}",
    ],
)
def test_templates_that_refuse_or_reach_too_far(text):
    tokenizer = Tokenizer(trained(), text)
    with pytest.raises(ValueError, match="the chat template refused"):
        print(tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]))
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(trained()).apply_chat_template([])


def test_templates_use_the_tags_they_are_written_for():
    text = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    rendered = Tokenizer(trained(), text).apply_chat_template([{"role": "é"}, {"role": "b"}])
    assert rendered == '{"role": "é"}'


STREAMED = {"bytes": Tokenizer(trained()), "sentencepiece": sentencepiece()}


@pytest.mark.parametrize("kind", STREAMED)
@given(data=st.data())
def test_streamed_text_is_the_text_of_all_ids(kind, data):
    tokenizer = STREAMED[kind]
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
    texts = st.text("heló 東🙂\n▁", max_size=20).map(tokenizer.encode)
    ids = data.draw(texts if kind == "sentencepiece" else any_ids | texts)
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push([i]) for i in ids), stream.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", STREAMED)
def test_streamed_characters_are_whole(kind):
    tokenizer, text = STREAMED[kind], "hello 東京 🙂\n wor é"
    stream = TextStream(tokenizer)
    parts = [stream.push([i]) for i in tokenizer.encode(text)]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert stream.finish() == ""


def test_added_ids_of_images_are_allowed_past_the_vocabulary():
    inner = trained()
    inner.add_special_tokens([AddedToken("<image_soft_token>")])
    assert Tokenizer(inner).largest_id == 301
    assert Tokenizer(inner).vocab_size == 303


def test_a_folder_without_tokenizer(tmp_path):
    assert Tokenizer.from_folder(write(tmp_path, *read("llama"))) is None
    assert Tokenizer.from_folder(GOLDEN / "llama") is None
