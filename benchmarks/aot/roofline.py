"""How fast decode attention can be on TPUs that are not here, from the compiler's own schedule.

    python -m benchmarks.aot.roofline --out benchmarks/results/tpu_roofline.json

For each serving case: bytes a token and KV head against the chip's bandwidth, bundles a token and KV head against its
clock. The slower of the two is the prediction, a bound: it knows no waits, no start of the grid, no refresh of memory.
"""

import importlib
import json
import math
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

from benchmarks.aot.bundles import Schedule, schedule
from benchmarks.plot import tpu_roofline
from experiments.cli import environment, run
from pallas_kernels.codebook_decode.block_sizes import tpu_sizes as codebook_sizes
from pallas_kernels.entropy_decode.block_sizes import tpu_sizes as entropy_sizes
from pallas_kernels.entropy_decode.formats import StreamFormat
from pallas_kernels.low_rank_decode.block_sizes import tpu_block
from pallas_kernels.quantized_decode.block_sizes import tpu_sizes

OPERATIONS = (  # that read all tokens
    "quantized_decode",
    "homomorphic_decode",
    "low_rank_decode",
    "entropy_decode",
    "codebook_decode",
)

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
    calls = [(chip, operation, name) for chip in names for operation in OPERATIONS for name in _cases(operation)]
    rows = [_predict(*call) for call in track(calls, "compiling", console=Console(stderr=True))]
    content = {"meta": environment(), "chips": CHIPS, "rows": rows}
    config.out.write_text(json.dumps(content, indent=1) + "\n")
    tpu_roofline(content, config.out.with_suffix(".png"))
    table = Table(title="decode attention, a token and KV head")
    left = ("chip", "operation", "case")
    for title in (*left, "bytes", "bundles", "ns, memory", "ns, bundles", "of bandwidth", "VMEM, MB"):
        table.add_column(title, justify="left" if title in left else "right")
    for row in rows:
        share = f"{row['share_of_bandwidth']:.0%}"
        figures = (f"{row[name]:.2f}" for name in ("bundles", "memory_ns", "bundle_ns"))
        table.add_row(
            row["chip"], row["operation"], row["case"], f"{row['bytes']:.0f}", *figures, share,
            f"{row['vmem_bytes'] / 2**20:.1f}",
        )  # fmt: skip
    Console().print(table)


def _cases(operation: str) -> dict[str, Any]:
    return importlib.import_module(f"pallas_kernels.{operation}.cases").SERVING


def _predict(chip: str, operation: str, name: str) -> dict[str, Any]:
    case = _cases(operation)[name]
    q, k, v, *rest = case.shapes()
    sums = rest[:2] if operation == "homomorphic_decode" else ()
    heads_tokens = math.prod(q.shape[:2]) * case.num_slots
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((k, v, sums))) / heads_tokens
    block, tile = _sizes(operation, case)
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, "-m", "benchmarks.aot.compile_group", chip, f"{operation} / tpu", "0", name]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if '"error"' in done.stdout or "aot:" not in done.stdout:
            raise RuntimeError(f"{chip}, {operation}, {name} does not compile: {(done.stdout + done.stderr)[-500:]}")
        record = json.loads(done.stdout.split("aot:")[1].splitlines()[0])
        found = schedule(Path(folder), operation)
    bandwidth, clock = CHIPS[chip]
    bundles = found.step / block + _of_tile(found, case) / tile
    memory_ns, bundle_ns = num_bytes / bandwidth * 1e9, bundles / clock * 1e9
    return {"chip": chip, "operation": operation, "case": name, "bytes": num_bytes, "bundles": bundles,
            "memory_ns": memory_ns, "bundle_ns": bundle_ns, "share_of_bandwidth": min(1.0, memory_ns / bundle_ns),
            "vmem_bytes": record["vmem_bytes"], "block": block, "tile": tile}  # fmt: skip


def _sizes(operation: str, case: Any) -> tuple[int, int]:
    """Tokens of a block and of a tile."""
    if operation == "codebook_decode":
        return codebook_sizes(*case.shapes()[:3])
    formats = case.options["k_format"], case.options["v_format"]
    if operation == "entropy_decode":
        return entropy_sizes(case.num_slots, math.lcm(*(fmt.block for fmt in formats)))
    if operation == "low_rank_decode":
        dense = [x for x in case.shapes()[1:3] if not isinstance(x, tuple)]
        return tpu_sizes(case.num_slots, *zip((case.k_rank, case.v_rank), formats, strict=True), most=tpu_block(*dense))
    return tpu_sizes(case.num_slots, *((case.head_dim, fmt) for fmt in formats))


def _of_tile(found: Schedule, case: Any) -> int:
    """Bundles of a tile. Loops inside it decode streams, four symbols of each a turn: first of keys, then of values."""
    if not isinstance(case.options.get("k_format"), StreamFormat):
        return found.inner + sum(found.innermost)
    turns = [fmt.line // fmt.pieces // 4 for fmt in (case.options["k_format"], case.options["v_format"])]
    keys, *values = found.innermost  # of keys that take several loops the turns are those of values
    return found.inner + keys * turns[0] + sum(values) * turns[1]


if __name__ == "__main__":
    sys.exit(run(Config, main))
