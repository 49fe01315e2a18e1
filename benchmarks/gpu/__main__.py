"""Run the benchmark: versions, bandwidth, correctness of every compiled kernel, then times.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json

Stops at the deadline with what it has. `--rehearse` runs the same steps at tiny shapes with plain JAX on a CPU, and
marks the file as a rehearsal.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch, the baseline, needs memory too

import jax

from benchmarks import attention, timing
from benchmarks.gpu import correct, quantize, steps
from benchmarks.plot import roofline
from benchmarks.record import Record

_KERNELS = ("gpu", "hopper")


def main() -> int:
    """Run every step that the deadline leaves time for; 1 if a case was wrong, 2 without a GPU."""
    options = _options()
    platform = jax.default_backend()
    if platform != "gpu" and not options.rehearse:
        print(f"benchmarks.gpu needs a GPU, but JAX found only {platform}; --rehearse tries the steps without one.",
              file=sys.stderr)  # fmt: skip
        return 2
    tiny = options.rehearse
    record = Record(options.out, options.deadline, rehearsal=tiny, rounds=options.rounds)
    record.add("bandwidth", **timing.bandwidth(2**22 if tiny else 2**31, options.rounds, record.left))
    checked = ("blocked", "reference") if tiny else options.backends
    right = correct.check(record, checked, 2 if tiny else None, options.workers, share=0.55)
    backends = ("reference",) if tiny else _usable(record, options.backends)
    shapes = [attention.Shape(1, 256, heads=2, dim=64)] if tiny else attention.SHAPES
    distinct = 2**17 if tiny else attention.DISTINCT_BYTES
    call_s = 1e-4 if tiny else timing.CALL_S
    for number, shape in enumerate(shapes):
        if record.left() < 0:
            record.add("cut", shapes_not_reached=len(shapes) - number)
            break
        attention.measure(record, shape, backends, options.rounds, distinct, call_s=call_s)
        if number == 0 and record.left() > 0:
            quantised = (1, 2, 256, 64) if tiny else (8, 8, 32768, 128)
            quantize.measure(record, backends, quantised, options.rounds, call_s=call_s)
        if number == 0:
            steps.measure(record, options.layers, options.rounds, options.workers, tiny=tiny)
    reached = all(row["outcome"] != "not reached" for row in record.content["correctness"])
    record.content["complete"] = reached and "cut" not in record.content
    record.save()
    roofline(record.content, options.out.with_suffix(".png"))
    return 0 if right else 1


def _usable(record: Record, backends: tuple[str, ...]) -> tuple[str, ...]:
    """Backends whose decode attention was right, or not reached, in a case; times say nothing of the others."""
    kept = {
        row["backend"]
        for row in record.content.get("correctness", [])
        if row["operation"] == "quantized_decode" and row["outcome"] in ("right", "not reached")
    }
    return tuple(backend for backend in backends if backend in kept)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--deadline", type=float, default=460.0, help="seconds after which no new step starts")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved repetitions")
    parser.add_argument("--workers", type=int, default=8, help="threads that compile cases")
    parser.add_argument("--layers", type=int, default=32, help="of the Llama-3-8B that takes decode steps; 0 = none")
    parser.add_argument("--backends", type=lambda s: tuple(s.split(",")), default=_KERNELS, help="comma-separated")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, plain JAX, any platform")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
