"""Compile every kernel and whole decode steps for devices that are not there, and say what the compilers made of them.

A program fails if it does not compile, if it should hold a kernel of ours and holds none, if it stores an array that
could be a decompressed cache, if its temporaries are large though it reads no codes, or if a GPU kernel spills,
asks for more shared memory than a block may have, or says nothing of either.

    python -m benchmarks.aot --cases

compiles the cases that interpreters run instead: there a backend may refuse a call, and temporaries may be as large as
the tiny arguments.
"""

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.aot.programs import Program, programs
from benchmarks.aot.targets import DEVICES
from experiments.cli import environment, run

FAST = "^(quantized_decode|quantize_pack|hadamard|gather_decode|low_rank_decode|prefill) /"
H200_SHARED = 227 * 1024  # bytes of shared memory that a block may have
LARGEST_SHARE = 0.5  # of the arguments, for temporaries of a kernel: no copy of what it reads, no matrix of scores


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile."""

    devices: str = "v5e,v6e,h200"
    """Devices, separated by commas."""
    only: str = ""
    """Compile programs in whose group and name this regular expression is found, e.g. "decode step.*int8"."""
    layers: int = 2
    """Layers of the models whose decode steps are compiled, of 30 and 32 that are all alike; 0 = all, which takes
    minutes each."""
    cases: bool = False
    """Compile the cases that interpreters run, instead of serving shapes and decode steps; without `only`, not those
    of operations whose kernels take long to lower."""
    out: Path | None = None
    """Where the records go; by default aot.json, with `cases` aot_cases.json, in benchmarks/results."""
    timeout_s: int = 900
    """Seconds that one group may take."""
    workers: int = 2
    """Groups compiled at a time, each in a process of its own."""


def main(config: Config) -> None:
    """Compile groups in processes of their own and print a table."""
    names = config.devices.split(",")
    unknown = [name for name in names if name not in DEVICES]
    if unknown:
        raise ValueError(f"device {unknown[0]!r} is unknown; choose from {', '.join(DEVICES)}.")
    try:
        re.compile(config.only)
    except re.error as error:
        raise ValueError(f"only={config.only!r} is no regular expression: {error}.") from error
    groups = [(name, group, found) for name in names for group, found in _groups(name, config)]
    if not groups:
        raise ValueError(f"only={config.only!r} is found in no program; one is named 'quantized_decode / tpu / split'.")
    records = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=sum(len(found) for *_, found in groups))
        with ThreadPoolExecutor(config.workers) as pool:
            futures = [pool.submit(_compile, *group, config) for group in groups]
            for (name, group, found), future in zip(groups, futures, strict=True):
                progress.update(task, description=f"{name}: {group}")
                records += future.result()
                progress.advance(task, len(found))
    for record in records:
        record["failed"] = failure(record, tiny=config.cases)
    out = config.out or Path("benchmarks/results", "aot_cases.json" if config.cases else "aot.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    if config.cases:
        out.write_text(compact(records))
    else:
        meta = {**environment(), "layers": config.layers or "all"}
        out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    _print(records)
    failed = [record for record in records if record["failed"]]
    if failed:
        first = failed[0]
        raise ValueError(
            f"{len(failed)} of {len(records)} programs failed, the first: {first['device']}, {first['group']}, "
            f"{first['name']}: {first['failed']}"
        )


def failure(record: dict[str, Any], *, tiny: bool = False) -> str:
    """Why a program counts as failed; empty if it does not. With `tiny` arguments, temporaries may be as large."""
    if "error" in record:
        return record["error"]
    if "refused" in record:
        return "" if tiny else f"refused: {record['refused']}"
    if record["expects_kernel"] and not record["kernels"]:
        return "no kernel of ours is in it."
    if record["decoded"] and record["expects_kernel"]:
        return f"it stores {', '.join(record['decoded'])}, as large as a decompressed cache."
    if (
        not tiny
        and record["expects_kernel"]
        and not record["reads_codes"]
        and record["temporary_bytes"] > LARGEST_SHARE * record["argument_bytes"]
    ):
        return f"{record['temporary_bytes']} temporary bytes for {record['argument_bytes']} of arguments."
    if record["device"] == "h200" and record["expects_kernel"] and "spills" not in record:
        return "no figures of its kernel."  # nobody has looked for spills
    if record.get("spills"):
        return f"{record['spills']} bytes of spilled registers."
    if record.get("shared_bytes", 0) > H200_SHARED:
        return f"{record['shared_bytes']} bytes of shared memory, a block may have {H200_SHARED}."
    return ""


def compact(records: list[dict[str, Any]]) -> str:
    """JSON with a line for each case: what became of it, and figures."""
    lines = []
    for record in records:
        operation, backend = record["group"].split(" / ")
        outcome = f"failed: {record['failed']}" if record["failed"] else "compiled"
        row = {"operation": operation, "case": record["name"], "device": record["device"], "backend": backend,
               "outcome": f"refused: {record['refused']}" if "refused" in record else outcome}  # fmt: skip
        figures = ("spills", "registers", "shared_bytes", "vmem_bytes", "temporary_bytes")
        lines.append(json.dumps(row | {name: record[name] for name in figures if name in record}))
    return f'{{"meta": {json.dumps(environment())},\n "records": [\n  {f",{chr(10)}  ".join(lines)}\n]}}\n'


def _groups(device_name: str, config: Config) -> list[tuple[str, list[Program]]]:
    groups = collections.defaultdict(list)
    only = config.only or (FAST if config.cases else "")
    for program in programs(DEVICES[device_name], config.layers, cases=config.cases):
        if re.search(only, f"{program.group} / {program.name}"):
            groups[program.group].append(program)
    return list(groups.items())


def _compile(device_name: str, group: str, found: list[Program], config: Config) -> list[dict[str, Any]]:
    """Records of a group; what a dying compiler took with it is tried again alone."""
    done, said = _process(device_name, group, found, config)
    records = {record["name"]: record for record in done}
    for program in found:
        if program.name not in records:
            if len(found) > 1:
                done, said = _process(device_name, group, [program], config)
            lost = {"device": device_name, "group": group, "name": program.name, "expects_kernel": program.kernels}
            records[program.name] = done[0] if done else {**lost, "error": f"the compiler died: {said[-500:]}"}
    return list(records.values())


def _process(device_name: str, group: str, found: list[Program], config: Config) -> tuple[list[dict[str, Any]], str]:
    names = [program.name for program in found]
    what = "cases" if config.cases else str(config.layers)
    command = [sys.executable, "-m", "benchmarks.aot.compile_group", device_name, group, what, *names]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nobody holds a device here
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=config.timeout_s)
        said, complaint = done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        said, complaint = (stopped.stdout or b"").decode(), f"stopped after {config.timeout_s} s"
    return [json.loads(line[4:]) for line in said.splitlines() if line.startswith("aot:")], complaint


def _print(records: list[dict[str, Any]]) -> None:
    table = Table(title="compiled ahead of time")
    figures = {"registers": ("registers", 1), "spills": ("spills", 1), "shared kB": ("shared_bytes", 1024),
               "VMEM kB": ("vmem_bytes", 1024)}  # fmt: skip
    for title in ("device", "group", "programs", "refused", "failed", "temporary / arguments", *figures):
        table.add_column(title, justify="left" if title in ("device", "group") else "right")
    groups = collections.defaultdict(list)
    for record in records:
        groups[record["device"], record["group"]].append(record)

    def most(found: list[dict[str, Any]], key: str, scale: int) -> str:
        values = [record[key] for record in found if key in record]
        return f"{max(values) / scale:.0f}" if values else ""

    for (device, group), found in groups.items():
        compiled = [r for r in found if "temporary_bytes" in r]
        share = max((r["temporary_bytes"] / r["argument_bytes"] for r in compiled), default=0.0)
        refused, failed = sum("refused" in r for r in found), sum(bool(r["failed"]) for r in found)
        largest = (most(found, *figure) for figure in figures.values())
        table.add_row(device, group, str(len(found)), str(refused), str(failed), f"{share:.1%}", *largest)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run(Config, main))
