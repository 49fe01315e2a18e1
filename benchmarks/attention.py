"""Time of decode attention by cache format: what is measured, and over which caches.

One program attends to many distinct caches one after the other, so that no cache is found in the L2, and where that
takes too short beside its launch, to all of them several times.
"""

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import timing
from benchmarks.record import Record
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.quantized_decode import quantized_decode


@dataclasses.dataclass(frozen=True)
class Shape:
    """One cache: rows, tokens, KV heads, head_dim, query heads of a KV head, and what the full cache is kept in."""

    batch: int
    tokens: int
    heads: int = 8
    dim: int = 128
    queries: int = 4
    dtype: str = "bfloat16"


# Most telling first; the deadline may cut the rest.
SHAPES = [Shape(8, 32768), Shape(1, 131072), Shape(32, 8192), Shape(1, 32768), Shape(8, 131072), Shape(32, 32768),
          Shape(8, 8192), Shape(1, 8192), Shape(32, 131072)]  # fmt: skip
BITS = (2, 3, 4, 8)
DISTINCT_BYTES = 480 * 2**20  # an L2 has 50 MB


def measure(
    record: Record, shape: Shape, backends: Sequence[str], rounds: int, distinct_bytes: int, *, call_s: float = 0.0
) -> None:
    """Time every variant at one shape, in one process and interleaved.

    Args:
      distinct_bytes: Least size of all the caches that a program attends to.
      call_s: How long a call should last at the memory's measured speed; 0 = all caches once. Not for CPUs, where XLA
        runs the bodies of loops on one thread.
    """
    speed = record.content["bandwidth"][0]["read_bytes_per_s"]
    programs: dict[str, Callable[[], float]] = {}
    facts: dict[str, dict] = {}
    made: dict[str, list] = {}
    q = _noise(0, (shape.batch, shape.heads, shape.queries, shape.dim), shape.dtype) * shape.dim**-0.5
    for name, (kind, step) in _variants(shape, backends).items():
        if record.left() < 0:
            break
        try:
            if kind not in made:
                made[kind] = _caches(shape, kind, distinct_bytes)
            size, count = _num_bytes(made[kind][0]), len(made[kind])
            times = timing.repeats(size * count, speed, call_s)
            program = step(q, made[kind], times)
            program()
        except Exception as error:  # a baseline that this machine cannot run is a result too
            reason = f"{type(error).__name__}: {error}"[:300]
            record.add("attention", variant=name, **dataclasses.asdict(shape), failed=reason)
            continue
        programs[name] = program
        facts[name] = {"bytes": size, "caches": count, "times": times}
    for name, row in timing.interleaved(programs, rounds, record.left).items():
        count, size = facts[name]["caches"] * facts[name]["times"], facts[name]["bytes"]
        each = {"median_s": row["median_s"] / count, "quartiles_s": [x / count for x in row["quartiles_s"]]}
        record.add("attention", variant=name, **dataclasses.asdict(shape), **facts[name], rounds=row["rounds"], **each,
                   bytes_per_s=size / each["median_s"])  # fmt: skip


def _caches(shape: Shape, kind: str, distinct_bytes: int) -> list:
    """Distinct caches of one kind, `distinct_bytes` in all or more."""
    make = jax.jit(lambda seed: _cache(shape, kind, seed))
    caches = [make(0)]
    while len(caches) * _num_bytes(caches[0]) < distinct_bytes:
        caches.append(make(len(caches)))
    return jax.block_until_ready(caches)


def _num_bytes(cache) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(cache))


def _variants(shape: Shape, backends: Sequence[str]) -> dict[str, tuple[str, Callable]]:
    """By name: the kind of cache, and a function from q, caches and how often to attend to them to a timed program."""
    variants: dict[str, tuple[str, Callable]] = {}
    for backend in backends:
        for bits in BITS:
            variants[f"{backend}-{bits}-bits"] = (f"{bits}", _quantized_step(bits, backend))
    full = "f32" if shape.dtype == "float32" else "bf16"
    if jax.devices()[0].platform == "gpu":
        from benchmarks.gpu.bf16 import bf16_decode  # needs jax-triton, which others do without

        variants["bf16-own"] = ("heads first", _each(lambda q, cache: bf16_decode(q, *cache)))
        variants["bf16-cudnn"] = ("tokens first", _each(_jax_attention("cudnn")))
    else:
        variants[f"{full}-own"] = ("heads first", _each(_softmax_attention))
    if importlib.util.find_spec("torch"):
        variants[f"{full}-torch-sdpa"] = ("heads first", _torch_step)
    variants[f"{full}-xla"] = ("tokens first", _each(_jax_attention("xla")))
    return variants


def _cache(shape: Shape, kind: str, seed: jax.Array) -> tuple:
    """Keys and values: bfloat16 [B, K, S, D] or [B, S, K, D], or random codes, so that no quantiser is waited for."""
    rows, tokens = (shape.batch, shape.heads), shape.tokens
    if kind in ("heads first", "tokens first"):
        size = (*rows, tokens, shape.dim) if kind == "heads first" else (rows[0], tokens, rows[1], shape.dim)
        return tuple(_noise(2 * seed + i, size, shape.dtype) for i in range(2))
    bits = int(kind)
    words = (*rows, tokens if bits == 8 else tokens * bits // 32, shape.dim)

    def one(seed, metadata_shape):
        scale = (1.5 + _noise(seed + 1, (*rows, *metadata_shape), jnp.float16)) / 2**bits
        codes = _hash(seed, words).astype(jnp.uint8 if bits == 8 else jnp.uint32)
        return Quantized(codes, scale, _noise(seed + 2, scale.shape, jnp.float16) - 1)

    return one(8 * seed, (tokens // 32, shape.dim)), one(8 * seed + 4, (tokens, shape.dim // 32))


def _noise(seed, shape: tuple[int, ...], dtype) -> jax.Array:
    """Values in [-1, 1), without the temporaries of a proper generator: a cache may take a tenth of the memory."""
    return (_hash(seed, shape) >> 25).astype(dtype) / 64 - 1


def _hash(seed, shape: tuple[int, ...]) -> jax.Array:
    """Well-mixed u32 from indices."""
    x = jnp.full(shape, seed, jnp.uint32)
    for axis in range(len(shape)):
        x = (x + lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(2654435761)
        x = x ^ (x >> 15)
    return x * jnp.uint32(2246822519)


def _quantized_step(bits: int, backend: str) -> Callable:
    formats = {"k_format": Format(bits, "channel", 32), "v_format": Format(bits, "token", 32)}

    def attend(q, cache):
        k, v = cache
        slots = v.scale.shape[2]
        length = jnp.full(q.shape[0], slots, jnp.int32)
        acc, _, total = quantized_decode(q, k, v, length, **formats, implementation=backend)
        return acc / total[..., None]

    return _each(attend)


def _softmax_attention(q, cache):
    """Attention of grouped queries in two products, as over a full cache."""
    k, v = cache
    p = jax.nn.softmax(jnp.einsum("bkrd,bksd->bkrs", q, k), axis=-1)
    return jnp.einsum("bkrs,bksd->bkrd", p, v)


def _jax_attention(implementation: str) -> Callable:
    def attend(q, cache):
        batch, heads, queries, dim = q.shape
        q = q.reshape(batch, 1, heads * queries, dim)
        return jax.nn.dot_product_attention(q, *cache, scale=1.0, implementation=implementation)

    return attend


def _each(attend: Callable) -> Callable:
    """Attend to all caches in one program, and as often as asked.

    Queries depend on all that came before, so that XLA can neither merge the repetitions nor take them out of the loop;
    the barrier keeps what is done to keys and values alone in it, e.g. transposes.
    """

    def once(q, caches):
        return [attend(q, cache) for cache in caches]

    def chained(q, caches, times):
        def again(_, q):
            out = once(*lax.optimization_barrier((q, caches)))
            return (q + 1e-6 * sum(x.reshape(q.shape).astype(jnp.float32) for x in out)).astype(q.dtype)

        return lax.fori_loop(0, times, again, q)

    def step(q, caches, times):
        compiled = jax.jit(once if times == 1 else partial(chained, times=times))
        return timing.wall(compiled, q, caches)

    return step


def _torch_step(q, caches, times: int) -> Callable[[], float]:
    import torch

    batch, heads, queries, dim = q.shape
    on_gpu = jax.devices()[0].platform == "gpu"
    if on_gpu:  # one query a head is what its split-KV kernels are for
        q = q.reshape(batch, heads * queries, 1, dim)
    q = torch.from_dlpack(q)
    caches = [tuple(torch.from_dlpack(x) for x in cache) for cache in caches]
    attention = torch.nn.functional.scaled_dot_product_attention
    options = {"enable_gqa": True} if on_gpu else {}  # on CPU that flag costs 2.5 times the grouped call

    def run() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            for k, v in caches * times:
                attention(q, k, v, scale=1.0, **options)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run
