"""From a Config dataclass to a command line whose errors are one clear line."""

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import tyro

C = TypeVar("C")


def run(config_class: type[C], main: Callable[[C], None], args: list[str] | None = None) -> int:
    """Parse arguments into `config_class`, call `main`, and return the exit code.

    0 is success; 2 bad input, with one line on stderr; 130 interrupted. Other errors are bugs and keep their traceback.
    """
    config = tyro.cli(config_class, args=args, description=sys.modules[main.__module__].__doc__)
    try:
        main(config)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, and the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def environment() -> dict[str, Any]:
    """Versions and device of this run."""
    packages = ("jax", "jaxlib", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{device.platform} {device.device_kind}",
        "machine": platform.machine(),
    }


def split_methods(text: str) -> list[str]:
    """Split a list of methods at semicolons; each is brought to its canonical form, repeated ones are dropped."""
    import kvcomp_jax as kvc

    methods = [str(kvc.parse(part.strip())) for part in text.split(";") if part.strip()]
    if not methods:
        raise ValueError(f"--methods {text!r} names no method; example: 'full;kivi:bits=2'.")
    return list(dict.fromkeys(methods))
