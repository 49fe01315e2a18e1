"""How fast decode attention can be on TPUs that are not here, from the compiler's own schedule.

    python -m benchmarks.aot.roofline --out benchmarks/results/tpu_roofline.json

For each width: bytes a token and KV head against the chip's bandwidth, bundles a token and KV head against its clock.
The slower of the two is the prediction, a bound: it knows no waits, no start of the grid, no refresh of the memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.aot.bundles import schedule
from experiments.cli import environment, run
from pallas_kernels.quantized_decode.block_sizes import tpu_sizes
from pallas_kernels.quantized_decode.cases import SERVING

CHIPS = {
    "v5e": (0.82e12, 1.5e9),
    "v6e": (1.64e12, 1.75e9),
}  # bytes a second, cycles a second; from their makers' sheets


@dataclass(frozen=True)
class Config:
    """What is predicted."""

    chips: str = "v5e,v6e"
    """Chips, separated by commas."""
    out: Path = Path("benchmarks/results/tpu_roofline.json")
    """Where the rows go."""


def main(config: Config) -> None:
    """Compile every serving case for every chip and print the table."""
    names = config.chips.split(",")
    unknown = [name for name in names if name not in CHIPS]
    if unknown:
        raise ValueError(f"chip {unknown[0]!r} is unknown; choose from {', '.join(CHIPS)}.")
    calls = [(chip, case) for chip in names for case in SERVING]
    rows = [_predict(chip, case) for chip, case in track(calls, "compiling", console=Console(stderr=True))]
    config.out.write_text(json.dumps({"meta": environment(), "chips": CHIPS, "rows": rows}, indent=1) + "\n")
    table = Table(title="decode attention, a token and KV head")
    for title in ("chip", "case", "bytes", "bundles", "ns, memory", "ns, bundles", "of bandwidth", "VMEM, MB"):
        table.add_column(title, justify="left" if title in ("chip", "case") else "right")
    for row in rows:
        share = f"{row['share_of_bandwidth']:.0%}"
        figures = (f"{row[name]:.2f}" for name in ("bundles", "memory_ns", "bundle_ns"))
        table.add_row(
            row["chip"], row["case"], f"{row['bytes']:.0f}", *figures, share, f"{row['vmem_bytes'] / 2**20:.1f}"
        )
    Console().print(table)


def _predict(chip: str, name: str) -> dict[str, Any]:
    case = SERVING[name]
    _, k, v, *_ = case.shapes()
    heads_tokens = k.codes.shape[0] * k.codes.shape[1] * case.num_slots
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((k, v))) / heads_tokens
    block, tile = tpu_sizes(case.num_slots, *((case.head_dim, fmt) for fmt in (case.k_format, case.v_format)))
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, "-m", "benchmarks.aot.compile_group", chip, "quantized_decode / tpu", "0", name]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if '"error"' in done.stdout or "aot:" not in done.stdout:
            raise RuntimeError(f"{chip}, {name} does not compile: {(done.stdout + done.stderr)[-500:]}")
        record = json.loads(done.stdout.split("aot:")[1].splitlines()[0])
        found = schedule(Path(folder), "quantized_decode")
    bandwidth, clock = CHIPS[chip]
    bundles = found.step / block + found.inner / tile
    memory_ns, bundle_ns = num_bytes / bandwidth * 1e9, bundles / clock * 1e9
    return {"chip": chip, "case": name, "bytes": num_bytes, "bundles": bundles, "memory_ns": memory_ns,
            "bundle_ns": bundle_ns, "share_of_bandwidth": min(1.0, memory_ns / bundle_ns),
            "vmem_bytes": record["vmem_bytes"], "block": block, "tile": tile}  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(Config, main))
