"""Every kernel and whole decode steps compiled for TPU v5e, v6e and an H200, without having one."""
