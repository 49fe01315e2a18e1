"""Say what each method's cache would hold for a model and a load, before anything is loaded or run."""

import dataclasses
import sys

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import kvcomp_jax as kvc
import models
from experiments.cli import run, split_methods
from experiments.compare import DEFAULT_METHODS


@dataclasses.dataclass(frozen=True)
class Config:
    """The load."""

    model: str = "smollm2"
    """What `models.load` takes; only its configuration is read."""
    context: int = 32768
    """Tokens in every row."""
    batch: int = 1
    """Rows."""
    methods: str = DEFAULT_METHODS
    """Methods, separated by semicolons."""
    cache_dtype: str = "bfloat16"
    """Of exact cached tokens."""


def main(config: Config) -> None:
    """Print the table."""
    if config.context < 1 or config.batch < 1:
        raise ValueError(f"context={config.context} and batch={config.batch} must be at least 1.")
    if config.cache_dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"cache_dtype={config.cache_dtype!r} must be float32, bfloat16 or float16.")
    methods = split_methods(config.methods)  # a misspelt name is complained of before the model is looked for
    layout = models.load_layout(config.model)
    rows = {method: forecast(method, layout, config) for method in methods}
    full = forecast("full", layout, config)
    table = Table(title=f"{config.model}: {config.batch} rows of {config.context} tokens, {config.cache_dtype}")
    for title in ("method", "MB used", "of it metadata", "MB allocated", "of it on host", "× smaller"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for method, held in rows.items():
        megabytes = [f"{x / 1e6:.3f}" for x in (held.used, held.metadata, held.allocated, held.host)]
        table.add_row(method, *megabytes, f"{full.used / held.used:.2f}")
    console = Console()
    console.print(table)
    if layout.max_positions is not None and config.context > layout.max_positions:
        console.print(f"Note: the model was made for {layout.max_positions} positions.")


def forecast(method: str, layout: kvc.Layout, config: Config) -> kvc.Bytes:
    """Bytes of all layers and rows."""
    plan = kvc.parse(method).plan(layout, max_len=config.context, prompt_len=config.context)
    return kvc.forecast(plan, [config.context] * config.batch, jnp.dtype(config.cache_dtype))


if __name__ == "__main__":
    sys.exit(run(Config, main))
