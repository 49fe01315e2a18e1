"""Tuned sizes of the kernels, by device."""

TPU_BLOCK = 1024  # tokens

# Tiles of the Triton kernels: what keeps a tile in registers at head_dim 256 without spilling.
TOKENS = 32  # of a tile that quantises per token, all channels wide
CHANNELS = 128  # of a tile that quantises per channel, one group high

HOPPER_BYTES = 64 * 2**10  # of x in a block's shared memory, so that several blocks fit a processor
