"""Tuned sizes of the kernels, by device."""

HOPPER_BYTES = 64 * 2**10  # of x in a block's shared memory, so that several blocks fit a processor
