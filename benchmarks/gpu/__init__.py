"""Correctness and speed of the kernels on a GPU: `python -m benchmarks.gpu --out benchmarks/results/gpu.json`."""
