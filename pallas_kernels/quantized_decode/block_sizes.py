"""Tuned sizes, in tokens.

Plain JAX on 2 cores, 4 bits, 16k slots, 8 KV heads, 4 queries each, processor milliseconds: blocks of 256 took 11.1,
512 took 8.4, 1024 took 8.8; a loop for each head 11.5. Full float32 attention took 18.0.
"""

BLOCKED = 512
CPU = 256  # sums of 16-bit probabilities times 8-bit codes then just fit 32 bits
