"""What the Triton kernels of either storage share: who asks, scales, logits in memory."""

import triton
import triton.language as tl

from pallas_kernels.triton_attention import DEAD, position, see, tanh


@triton.jit
def queries(
    length_ptr, pos_ptr, q_pos_ptr, head, num_heads: tl.constexpr, num_rows: tl.constexpr, num_slots: tl.constexpr,
    rows: tl.constexpr, pos_heads: tl.constexpr,
):  # fmt: skip
    """Query rows of this program, the slots filled, the queries' positions, and where those of slots begin."""
    batch, row = head // num_heads, tl.program_id(2) * rows + tl.arange(0, rows)
    length = tl.minimum(tl.load(length_ptr + batch), num_slots)
    q_pos = row
    if pos_heads > 0:
        q_pos = tl.load(q_pos_ptr + batch * num_rows + row, mask=row < num_rows, other=-1)
        pos_ptr += (head if pos_heads == num_heads else batch).to(tl.int64) * num_slots
    return row, length, q_pos, pos_ptr


@triton.jit
def scales(
    scale_ptr, zero_ptr, head, slot, channel, has_slot, has_channel,
    num_slots: tl.constexpr, dim: tl.constexpr, scale_rows: tl.constexpr, scale_cols: tl.constexpr,
):  # fmt: skip
    """Scales and zero points of slots and channels, which broadcast; 0 where there is none."""
    at, mask = (head * scale_rows + slot // (num_slots // scale_rows)) * scale_cols, has_slot
    if scale_cols > 1:
        at, mask = at + channel // (dim // scale_cols), has_slot & has_channel
    scale = tl.load(scale_ptr + at, mask=mask, other=0).to(tl.float32)
    zero = tl.load(zero_ptr + at, mask=mask, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def finish_logits(
    logits, top, logits_ptr, pos_ptr, head, slot, exists, row, length, q_pos,
    num_rows: tl.constexpr, num_slots: tl.constexpr, pos_heads: tl.constexpr, soft_cap: tl.constexpr,
    sliding_window: tl.constexpr,
):  # fmt: skip
    """Cap and mask logits [slots, R], store those that exist, and return the maximum with `top`."""
    if soft_cap > 0:
        logits = soft_cap * tanh(logits / soft_cap)
    filled = exists & (slot < length)
    live = see(position(pos_ptr, slot, filled, pos_heads), filled, q_pos, pos_heads, sliding_window)
    logits = tl.where(live, logits, DEAD)
    at = (head * num_slots + slot)[:, None] * num_rows + row[None, :]
    tl.store(logits_ptr + at, logits, mask=exists[:, None] & (row < num_rows)[None, :])
    return tl.maximum(top, tl.max(logits, 0))


@triton.jit
def load_logits(logits_ptr, head, slot, exists, row, num_rows: tl.constexpr, num_slots: tl.constexpr):
    """Logits f32[slots, R]; DEAD where there is no slot, so that its exponential is 0."""
    at = (head * num_slots + slot)[:, None] * num_rows + row[None, :]
    return tl.load(logits_ptr + at, mask=exists[:, None] & (row < num_rows)[None, :], other=DEAD)
