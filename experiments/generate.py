"""Generate text with a compressed cache, and say what the cache took."""

import dataclasses
import sys
from typing import Annotated

import tyro
from rich.console import Console

import kvcomp_jax as kvc
import models
from experiments.cli import run
from experiments.measure import saves


@dataclasses.dataclass(frozen=True)
class Config:
    """What to generate."""

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """The text to continue, or the message to answer."""
    model: str = "smollm2"
    """What `models.load` takes."""
    method: str = "full"
    """How the cache is kept, e.g. kivi:bits=4."""
    max_new_tokens: int = 128
    """At most so many tokens."""
    chat: bool = True
    """Use the model's chat template if it has one."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Sample among so many tokens; 0 is all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that hold this probability."""
    seed: int = 0
    """Of the sampling."""
    stop: tuple[str, ...] = ()
    """Texts that end the output."""


def main(config: Config) -> None:
    """Stream the text, then print the figures."""
    kvc.parse(config.method)  # before a model is loaded for nothing
    lm = models.load(config.model)
    if lm.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; text needs one.")
    text, special = config.prompt, True
    if config.chat and lm.tokenizer.chat_template is not None:
        text = lm.tokenizer.apply_chat_template([{"role": "user", "content": config.prompt}])
        special = False  # the template writes them
    out = lm.generate(
        [lm.tokenizer.encode(text, add_special_tokens=special)],
        config.method,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop=config.stop,
        stream=lambda row, piece: print(piece, end="", flush=True),
    )
    print()
    stats, console = out.stats, Console(stderr=True)
    console.print(
        f"{config.method}: cache {stats.cache.used / 1e6:.3f} MB used, {stats.cache.allocated / 1e6:.3f} MB allocated; "
        f"full cache {stats.full.used / 1e6:.3f} MB used ({stats.full.used / stats.cache.used:.2f}x)"
    )
    if config.method != "full" and not saves(stats.cache, stats.full):
        console.print("no bytes saved: the text is too short for this method to compress anything")
    console.print(
        f"prefill {stats.prefill_s:.2f} s, decode {stats.tokens_per_s:.1f} tokens/s, "
        f"compilation {stats.compile_s:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(run(Config, main))
