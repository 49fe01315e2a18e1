"""Tuned sizes, in tokens. CPU with 2 cores: (512, 256) took 48 ms, (256, 256) 49, (512, 512) 88, (128, 256) 55."""

QUERY_BLOCK = 512
KEY_BLOCK = 256

# TPU: query rows (tokens times heads of a group) and slots of a block. 512 x 512 float32 logits are 1 MiB of VMEM.
TPU_ROWS = 512
TPU_KEY_BLOCK = 512
