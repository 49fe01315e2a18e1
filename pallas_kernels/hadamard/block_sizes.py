"""Tuned sizes: rows of a block on TPU. 1024 x 512 in float32 are 2 MiB of VMEM, read and written twice buffered."""

TPU_ROWS = 1024
