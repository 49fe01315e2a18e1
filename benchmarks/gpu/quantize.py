"""Bandwidth of quantising bfloat16 rows to packed codes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.record import Record
from benchmarks.timing import interleaved, wall
from pallas_kernels.formats import Format
from pallas_kernels.quantize_pack import quantize_pack


def measure(record: Record, backends: Sequence[str], shape: tuple[int, ...], rounds: int) -> None:
    """Time both axes at every width; bytes are those read plus those written."""
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    programs, sizes = {}, {}
    for backend in backends:
        for axis in ("token", "channel"):
            for bits in (2, 3, 4, 8):
                fmt, name = Format(bits, axis, 32), f"{backend}-{axis}-{bits}-bits"  # type: ignore[arg-type]
                run = jax.jit(lambda x, fmt=fmt, backend=backend: quantize_pack(x, fmt, implementation=backend))
                try:
                    out = run(x)
                except Exception as error:
                    record.add("quantize_pack", variant=name, failed=f"{type(error).__name__}: {error}"[:300])
                    continue
                programs[name], sizes[name] = wall(run, x), x.nbytes + sum(y.nbytes for y in jax.tree.leaves(out))
    for name, row in interleaved(programs, rounds, record.left).items():
        speed = sizes[name] / row["median_s"]
        record.add("quantize_pack", variant=name, shape=shape, bytes=sizes[name], bytes_per_s=speed, **row)
