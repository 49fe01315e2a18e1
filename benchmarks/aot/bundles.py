"""What the TPU compiler scheduled: instruction bundles of a kernel's loops.

Works on what `LIBTPU_INIT_ARGS="--xla_jf_dump_to=FOLDER --xla_jf_dump_llo_text=true"` leaves. A core starts one bundle
a cycle, so the bundles of a loop's body are the fewest cycles it can take; waits on memory come on top.
"""

import itertools
import re
from pathlib import Path
from typing import NamedTuple


class Schedule(NamedTuple):
    """Of one kernel with a grid and a loop inside a step."""

    step: int  # bundles of a step of the grid outside inner loops, all branches counted
    inner: int  # bundles of one turn of the loops inside it, outside of loops inside those
    innermost: tuple[int, ...]  # bundles of one turn of loops inside those, in order; neighbours are counted together


def schedule(folder: Path, kernel: str) -> Schedule:
    """Read the schedule of `kernel`, the name of a Pallas call, from a folder of dumps."""
    final = _only(folder, f"-{kernel}.*-final_bundles.txt")
    depths = [len(found) for found in re.findall(r"^ *(?:0x)?[0-9a-f]+ +(?:[A-Z]{2})? *: ?(>*) ?\{", final, re.M)]
    runs = [len(list(run)) for deep, run in itertools.groupby(depths, lambda depth: depth > 2) if deep]
    return Schedule(depths.count(1), depths.count(2), tuple(runs))


def _only(folder: Path, pattern: str) -> str:
    found = [path for path in folder.iterdir() if re.search(pattern.replace("*", ".*"), path.name)]
    found = [path for path in found if "schedule-analysis" not in path.name]
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} files like {pattern}; dump one program at a time.")
    return found[0].read_text()
