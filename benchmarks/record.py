"""The result file: written anew after every step, so that a run that is cut short leaves what it has."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax


class Record:
    """Results by section; `add` appends and saves."""

    def __init__(self, path: Path, deadline_s: float, **facts: Any):
        self.path, self._end, self._start = path, time.monotonic() + deadline_s, time.monotonic()
        self.content: dict[str, Any] = {"complete": False, **facts, **_versions()}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._end - time.monotonic()

    def add(self, section: str, **row: Any) -> None:
        """Append a row to a section, save, and say so."""
        self.content.setdefault(section, []).append(row)
        self.save()
        print(f"[{time.monotonic() - self._start:6.1f} s] {section}: {row}", flush=True)

    def save(self) -> None:
        """Write the file in one piece."""
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(draft, self.path)


def _versions() -> dict[str, Any]:
    versions = {}
    for name in ("jax", "jaxlib", "numba", "jax-triton", "triton", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        gpu = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        gpu = ""
    device = jax.devices()[0]
    return {"versions": versions, "device": device.device_kind, "platform": device.platform, "gpu": gpu,
            "gpu_fields": query, "python": platform.python_version()}  # fmt: skip
