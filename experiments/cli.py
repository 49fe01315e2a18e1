"""From a Config dataclass to a command line whose errors are one clear line."""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import io
import platform
import shlex
import sys
import types
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

C = TypeVar("C")
GROUPS = {"all-quantising": ("quantise",), "all-selecting": ("select",), "all": ("none", "quantise", "select")}


def run(config_class: type[C], main: Callable[[C], None], args: list[str] | None = None) -> int:
    """Parse arguments into `config_class`, call `main`, and return the exit code.

    0 is success; 2 bad input or a file that cannot be read or written, with one line on stderr; 130 interrupted. Other
    errors are bugs and keep their traceback. `--help` exits with 0 as usual.
    """
    try:
        main(_parse(config_class, sys.modules[main.__module__], args))
    except ValueError as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename or 'input or output'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, and the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def _parse(config_class: type[C], script: types.ModuleType, args: list[str] | None) -> C:
    """Read a command line; tyro's framed complaints become one ValueError."""
    program = f"python -m {script.__spec__.name}" if script.__spec__ else None
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                config_class, prog=program, description=script.__doc__, args=args, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_first_section(complaint.getvalue())) from None
        raise
    if unknown:
        known = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
        close = difflib.get_close_matches(unknown[0].replace("_", "-"), known, n=1)
        hint = f", did you mean {close[0]}?" if close else "; --help lists the options."
        raise ValueError(f"unknown option {unknown[0]}{hint}")
    return config


def _first_section(box: str) -> str:
    """The sentence in a framed message: what stands between the frame's top and its first rule."""
    lines = [line.strip("│ ") for line in box.splitlines() if line and line[0] not in "╭╰"]
    rule = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    return f"{' '.join(lines[:rule])}; --help explains the options."


def _complain(text: str) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 2


def environment() -> dict[str, Any]:
    """Versions and device of this run."""
    packages = ("kvcomp_jax", "jax", "jaxlib", "flax", "numpy")
    versions = {name: _version(name) for name in packages}
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": " ".join(dict.fromkeys((device.platform, device.device_kind))),
        "machine": platform.machine(),
    }


def provenance(config: Any, script: str) -> dict[str, Any]:
    """What results are kept with: the command, when, versions and device, and every setting but the folder."""
    settings = {
        name: str(x) if isinstance(x, Path) else list(x) if isinstance(x, tuple) else x
        for name, x in dataclasses.asdict(config).items()
    }
    settings.pop("out", None)
    return {
        "command": shlex.join(["python", "-m", f"experiments.{script}", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        **settings,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def split_methods(text: str) -> list[str]:
    """Split a list of methods at semicolons; each is brought to its canonical form, repeated ones are dropped.

    "all-quantising", "all-selecting" and "all" stand for every method of that kind in the settings of its source.
    """
    import kvcomp_jax as kvc

    parts: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        found = [info for info in kvc.METHODS.values() if info.axis in GROUPS.get(part, ())]
        parts += [f"{info.name}:{setting}" for info in found for setting in info.settings] or [part]
    methods = [str(kvc.parse(part)) for part in parts]
    if not methods:
        raise ValueError(f"--methods {text!r} names no method; example: 'full;kivi:bits=2'.")
    return list(dict.fromkeys(methods))
