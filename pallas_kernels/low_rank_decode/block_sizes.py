"""Tuned sizes of the kernels, by device and shape."""

import jax

_TPU_BYTES = 2**21  # of dense rows fetched together: two sides, both twice in VMEM


def tpu_block(*arrays: jax.Array) -> int:
    """Most tokens of a block of dense rows."""
    return _TPU_BYTES // max((max(x.shape[-1], 32) * x.dtype.itemsize for x in arrays), default=256)
