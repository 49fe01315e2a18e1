"""Tuned sizes, in tokens. CPU with 2 cores: (512, 256) took 48 ms, (256, 256) 49, (512, 512) 88, (128, 256) 55."""

QUERY_BLOCK = 512
KEY_BLOCK = 256
