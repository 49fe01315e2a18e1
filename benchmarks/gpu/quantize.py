"""Bandwidth of quantising bfloat16 rows to packed codes."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.record import Record
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.quantize_pack import quantize_pack


def measure(record: Record, backends: Sequence[str], shape: tuple[int, ...], rounds: int, *, call_s: float) -> None:
    """Time both axes at every width; bytes are those read plus those written.

    One program quantises as many distinct arrays as it takes to last `call_s`.
    """
    draw = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
    first = draw(jax.random.key(0))
    count = timing.repeats(first.nbytes, record.content["bandwidth"][0]["read_bytes_per_s"], call_s)
    given = [first, *(draw(jax.random.key(i)) for i in range(1, count))]
    programs, sizes = {}, {}
    for backend in backends:
        for axis in ("token", "channel"):
            for bits in (2, 3, 4, 8):
                fmt, name = Format(bits, axis, 32), f"{backend}-{axis}-{bits}-bits"  # type: ignore[arg-type]
                run = jax.jit(partial(_all, fmt, backend))
                try:
                    out = run(given)
                except Exception as error:
                    record.add("quantize_pack", variant=name, failed=f"{type(error).__name__}: {error}"[:300])
                    continue
                programs[name] = timing.wall(run, given)
                sizes[name] = sum(x.nbytes for x in jax.tree.leaves((first, out[0])))
    for name, row in timing.interleaved(programs, rounds, record.left).items():
        each = {"median_s": row["median_s"] / count, "quartiles_s": [x / count for x in row["quartiles_s"]]}
        record.add("quantize_pack", variant=name, shape=shape, arrays=count, bytes=sizes[name], rounds=row["rounds"],
                   **each, bytes_per_s=sizes[name] / each["median_s"])  # fmt: skip


def _all(fmt: Format, backend: str, arrays: Sequence[jax.Array]) -> list[Quantized]:
    return [quantize_pack(x, fmt, implementation=backend) for x in arrays]
