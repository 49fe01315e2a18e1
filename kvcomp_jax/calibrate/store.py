"""Calibrations as safetensors files that say which model, text and options they are of, and are refused elsewhere."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvcomp_jax.plan import Layout

FORMAT = "kvcomp_jax calibration 1"


class NotCalibrated(ValueError):
    """A method needs to be calibrated for the model first; says how."""


@dataclasses.dataclass(frozen=True)
class About:
    """Where a calibration comes from.

    Attributes:
      method: Its name.
      options: Of the method, as far as the calibration depends on them.
      fingerprint: Of the model.
      provenance: Anything else worth knowing: text, tokens, versions.
    """

    method: str
    options: dict[str, Any]
    fingerprint: str
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)


def file_name(method: str, options: Mapping[str, Any]) -> str:
    """The name under which the calibration of a method with these options is looked for beside a model."""
    return "-".join([method, *(f"{name}={value}" for name, value in options.items())]) + ".safetensors"


def save(file: Path, tensors: Mapping[str, np.ndarray], about: About) -> None:
    """Write a calibration; a reader sees the old file or the whole new one."""
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    metadata = {
        "format": FORMAT,
        "method": about.method,
        "options": json.dumps(about.options),
        "fingerprint": about.fingerprint,
        "provenance": json.dumps(about.provenance),
        "sha256": _digest(tensors),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def load(file: Path) -> tuple[dict[str, np.ndarray], About]:
    """Read a calibration.

    Raises:
      ValueError: If the file is absent, no calibration, or damaged.
    """
    if not file.is_file():
        raise ValueError(f"calibration {file}: no such file.")
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"calibration {file}: not a whole safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"calibration {file}: not a calibration, its format is {metadata.get('format')!r}.")
    if metadata.get("sha256") != _digest(tensors):
        raise ValueError(f"calibration {file}: is damaged, its tensors do not have the checksum it states.")
    try:
        options, provenance = (json.loads(metadata[name]) for name in ("options", "provenance"))
        return tensors, About(metadata["method"], options, metadata["fingerprint"], provenance)
    except (KeyError, ValueError) as error:
        raise ValueError(f"calibration {file}: its metadata is damaged: {error}") from error


def locate(name: str, method: str, options: Mapping[str, Any], layout: Layout) -> Path:
    """Where `find` looks; there need not be a file."""
    wanted = file_name(method, options) if name == "auto" else name
    beside = None if layout.calibrations is None else Path(layout.calibrations) / wanted
    return beside if beside is not None and (name == "auto" or not Path(name).is_file()) else Path(wanted)


def find(name: str, method: str, options: Mapping[str, Any], layout: Layout) -> dict[str, np.ndarray]:
    """Read the calibration of a method for a model.

    Args:
      name: A path, the name of a file beside the model, or "auto" for the one named after the options.
      method: What it must be of.
      options: What it must have been made with.
      layout: The model. Its fingerprint is compared where it is known.

    Raises:
      NotCalibrated: If there is none.
      ValueError: If it is of another method, model or options, or damaged.
    """
    file = locate(name, method, options, layout)
    if not file.is_file():
        text = ",".join(f"{key}={value}" for key, value in options.items())
        raise NotCalibrated(
            f"no calibration at {file}; make one with: python -m experiments.calibrate --method {method}:{text} "
            "--model MODEL --text TEXT, or name it with calibration=PATH."
        )
    stat = file.stat()
    tensors, about = _cached(file, stat.st_mtime_ns, stat.st_size)
    if about.method != method:
        raise ValueError(f"calibration {file} is of the method {about.method}, not of {method}.")
    for key, value in options.items():
        if about.options.get(key) != value:
            raise ValueError(f"calibration {file} was made with {key}={about.options.get(key)}, not {key}={value}.")
    if layout.fingerprint is not None and about.fingerprint != layout.fingerprint:
        raise ValueError(
            f"calibration {file} is of another model: its fingerprint is {about.fingerprint[:12]}, this model's "
            f"{layout.fingerprint[:12]}."
        )
    wrong = [x.shape for x in tensors.values() if x.shape[:1] != (layout.num_layers,)]
    if wrong:
        raise ValueError(f"calibration {file} has arrays {wrong[0]}, which do not fit {layout.num_layers} layers.")
    return dict(tensors)


@functools.lru_cache(maxsize=16)
def _cached(file: Path, changed: int, size: int) -> tuple[dict[str, np.ndarray], About]:
    return load(file)


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype.str} {x.shape} ".encode() + x.tobytes())
    return digest.hexdigest()
