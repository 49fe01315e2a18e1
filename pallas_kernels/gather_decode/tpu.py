"""Attention over selected pages on TPUs: the pages are put side by side as they are encoded, then attended to.

Where a page is contiguous, copies whose sources come from page indices in scalar memory fetch it and nothing else.
Head dimensions that do not fill 128 lanes lie with tokens or pages along lanes, so a page has no place of its own: of
codes XLA gathers the rows, of dense pages a product with one column for each selected page picks them, exactly; it
reads all pages.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import rows, softmax_state
from pallas_kernels.formats import Format, Quantized
from pallas_kernels.gather_decode.pages import Pages, as_rows, page_size
from pallas_kernels.low_rank_decode.tpu import low_rank_decode
from pallas_kernels.tpu_rows import LANES, SUBLANES


def gather_decode(
    q: jax.Array,
    k: Pages,
    v: Pages,
    page_index: jax.Array,
    page_length: jax.Array,
    *,
    k_format: Format | None,
    v_format: Format | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> softmax_state.State:
    """See `api.gather_decode`."""
    num_pages, size = page_length.shape[-1], page_size(k, k_format, page_length.shape[-1])
    found = jnp.where(page_index < 0, page_index.max(-1, keepdims=True), page_index)  # none: another one again
    found = jnp.maximum(found, 0)
    selected_k, selected_v = (_selected(x, found, num_pages, interpret) for x in (k, v))
    lengths = jnp.take_along_axis(jnp.broadcast_to(page_length, (*q.shape[:2], num_pages)), found, 2)
    live = jnp.arange(size)[None, None, None] < jnp.where(page_index >= 0, lengths, 0)[..., None]  # [B, K, n, P]
    pos = jnp.where(live, 0, -1).astype(jnp.int32).reshape(*q.shape[:2], -1)
    return low_rank_decode(
        q, selected_k, selected_v, jnp.where(live.any((1, 2, 3)), pos.shape[-1], 0).astype(jnp.int32), pos,
        jnp.zeros((q.shape[0], q.shape[2]), jnp.int32), k_format=k_format, v_format=v_format, soft_cap=soft_cap,
        sliding_window=None, interpret=interpret,
    )  # fmt: skip


def _selected(x: Pages, index: jax.Array, num_pages: int, interpret: bool) -> rows.Rows:
    """Rows [B, K, n * P, D] of the pages `index` i32[B, K, n]."""
    if isinstance(x, Quantized):
        parts = (None if part is None else _rows_of(part, index, num_pages) for part in x[1:])
        codes = x.codes
        *_, num_rows, dim = codes.shape
        if dim == LANES and codes.dtype.itemsize == 4:  # rows of 512 bytes, one after another
            copied = _copied(codes[:, :, :, None], index, num_rows // num_pages, interpret)
            return Quantized(copied.reshape(*codes.shape[:2], -1, dim), *parts)
        if dim % LANES == 0 and (num_rows // num_pages) % (SUBLANES * 4 // codes.dtype.itemsize) == 0:
            pages = codes.reshape(*codes.shape[:2], num_pages, -1, dim)
            return Quantized(as_rows(_copied(pages, index, 1, interpret)), *parts)
        return Quantized(_rows_of(codes, index, num_pages), *parts)
    if x.shape[-1] % LANES == 0:
        return as_rows(_copied(x, index, 1, interpret))
    column = (jnp.arange(num_pages)[None, None, :, None] == index[:, :, None]).astype(x.dtype)  # [B, K, N, n]
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return as_rows(jnp.einsum("bknpd,bknm->bkmpd", x, column, precision=exact))


def _rows_of(x: jax.Array, index: jax.Array, num_pages: int) -> jax.Array:
    """Gather [B, K, N * rows, D] -> [B, K, n * rows, D]."""
    size = x.shape[2] // num_pages
    places = (index[..., None] * size + jnp.arange(size)[None, None, None]).reshape(*index.shape[:2], -1, 1)
    return jnp.take_along_axis(x, places, 2, mode="promise_in_bounds")


def _copied(x: jax.Array, index: jax.Array, size: int, interpret: bool) -> jax.Array:
    """Copy the pages of `size` entries along axis 2 of x [B, K, N * size, rows, D] side by side."""
    batch, heads, num_found = index.shape
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_copy_kernel, num_found=num_found, size=size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads),
            in_specs=[anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, num_found * size, *x.shape[3:]), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="copy_pages",
    )(index.reshape(-1).astype(jnp.int32), x)


def _copy_kernel(index_ref, x_ref, out_ref, semaphore, *, num_found: int, size: int):
    """Start the copies of all pages of one head, then wait for them."""
    b, h = pl.program_id(0), pl.program_id(1)
    first = (b * pl.num_programs(1) + h) * num_found

    def copy(i):
        source = x_ref.at[b, h, pl.ds(index_ref[first + i] * size, size)]
        return pltpu.make_async_copy(source, out_ref.at[b, h, pl.ds(i * size, size)], semaphore)

    lax.fori_loop(0, num_found, lambda i, _: copy(i).start(), None)
    lax.fori_loop(0, num_found, lambda i, _: copy(i).wait(), None)
