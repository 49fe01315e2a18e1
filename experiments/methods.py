"""List the methods: what each does, when to take it, its options and where it comes from."""

import dataclasses
import sys

from rich.console import Console
from rich.table import Table

import kvcomp_jax as kvc
from experiments.cli import run


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing to choose."""


def main(config: Config) -> None:
    """Print the table."""
    del config
    table = Table(title="Methods", show_lines=True)
    for title in ("method", "axis", "bits", "needs calibration", "options and defaults", "source"):
        table.add_column(title, overflow="fold")
    for info in kvc.METHODS.values():
        options = ", ".join(f"{name}={option.default}" for name, option in info.options.items())
        calibration = "yes" if info.calibration else "no"
        what = f"{info.name}\n[dim]{info.summary}[/dim]" + (f"\n{info.advice}" if info.advice else "")
        table.add_row(what, info.axis, info.bits, calibration, options, info.source)
    console = Console()
    console.print(table)
    console.print(
        "A selecting and a quantising method compose: h2o:budget=0.5+int4. Budgets are tokens, or a fraction."
    )


if __name__ == "__main__":
    sys.exit(run(Config, main))
