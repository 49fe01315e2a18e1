"""Slots that the blocked backend reads at a time."""

BLOCKED = 512  # 768 streams of 128 symbols for 3 heads of 64 channels: wide steps, and everything stays in cache
