"""Tuned sizes of the kernels, by device."""

TPU_ROWS = 1024  # of a block: 1024 x 512 in float32 are 2 MiB of VMEM, read and written twice buffered

_GPU_ELEMENTS = 64 * 128  # rotated at a time: 64 float32 registers in each thread of 4 warps
_GPU_MATRIX_BYTES = 2**15  # of the matrix in shared memory at a time; a float32 is split, and held twice


def gpu_rows(width: int) -> int:
    """Rows of a tile that is `width` channels wide."""
    return min(max(_GPU_ELEMENTS // width, 16), 64)


def gpu_chunk(dim: int, width: int, itemsize: int) -> int:
    """Channels, a power of two from 16, that are multiplied at a time with `width` columns of the matrix."""
    return max(16, min(1 << (dim - 1).bit_length(), _GPU_MATRIX_BYTES // (width * (8 if itemsize == 4 else 2))))


def gpu_warps(rows: int, width: int) -> int:
    """Warps that hold a tile in registers."""
    return 8 if rows * width > _GPU_ELEMENTS else 4
