"""A tiny model folder with a tokenizer of one id a character, and a text for it."""

import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "llama"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,;:!?'\n0123456789-"
METHODS = "full;int8:block_size=16;kivi:bits=2,group_size=16,residual=32;streaming_llm:budget=40"


def write_model(folder: Path) -> Path:
    """Copy the golden Llama (3 layers, 2 KV heads of 16, 512 positions, 199 ids) and give it a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder / name)
    ids = {character: 10 + i for i, character in enumerate(CHARACTERS)} | {"<unk>": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_text(file: Path, num_characters: int = 1000) -> Path:
    """Characters drawn at random, from a fixed seed; each is one token."""
    drawn = np.random.default_rng(0).choice(list(CHARACTERS[:-11]), num_characters)
    file.write_text("".join(drawn))
    return file


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())
