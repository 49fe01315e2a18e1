"""Tuned sizes, in tokens. CPU with 2 cores: (512, 256) took 48 ms, (256, 256) 49, (512, 512) 88, (128, 256) 55."""

import dataclasses

QUERY_BLOCK = 512
KEY_BLOCK = 256
# With mass in the same pass: 64 queries at once took 26 ms, 128 and 256 took 19, 512 took 35; without mass 16.
MASS_QUERY_BLOCKS = (64, 128, 256)
MASS_BYTES = 2**25  # of exponentials that a block of queries may keep until their sums are known

# TPU: query rows (tokens times heads of a group) and slots of a block. 512 x 512 float32 logits are 1 MiB of VMEM.
TPU_ROWS = 512
TPU_KEY_BLOCK = 512

# Hopper: stages of keys and values in shared memory, and registers of a thread that computes and of one that fetches
# (two computing warpgroups and a fetching one share 512 a lane).
HOPPER_STAGES = 2
HOPPER_REGISTERS = (232, 40)
HOPPER_QUERY_BLOCK = 128  # of the mass pass


def hopper_key_block(head_dim: int) -> int:
    """Slots of a block; logits and accumulator of 64 rows stay in registers."""
    return 128 if head_dim <= 128 else 64


@dataclasses.dataclass(frozen=True)
class GpuBlocks:
    """Queries and slots of a program's block in Triton, and tiles of K and V in flight."""

    queries: int
    slots: int
    stages: int


def gpu_blocks(num_queries: int, padded: int, itemsize: int) -> GpuBlocks:
    """Sizes for rows of `padded` elements: logits and accumulators fit 4 warps' registers, tiles an A100's 163 kB.

    Rows of 4 bytes an element are split for the tensor cores into three products, and so take more of both; at
    head_dim 256 some registers spill all the same.
    """
    wide = itemsize > 2
    queries = min(max(16, 4096 // padded) if wide and padded > 64 else 64, max(1 << (num_queries - 1).bit_length(), 16))
    return GpuBlocks(queries, 32 if wide else 64, 2 if padded * itemsize >= 512 else 3)
