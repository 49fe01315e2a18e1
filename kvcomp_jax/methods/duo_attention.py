"""DuoAttention, Xiao et al. 2024, arXiv:2410.10819."""

import numpy as np

from kvcomp_jax.calibrate import Activations, find
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import Recency
from kvcomp_jax.spec import LayerSpec, Rung, blocks, exact_rung


def calibrate(layer: Activations, *, num_sinks: int = 64, recent: int = 256) -> dict[str, np.ndarray]:
    """Attention mass f32[K] that each KV head pays to tokens which are neither sinks nor recent.

    A mean over the queries that have such tokens; of the query heads of a group the one that pays most decides.
    """
    num_samples, num_tokens, num_kv_heads, _ = layer.k.shape
    if layer.q is None:
        raise ValueError("activations without queries do not tell where heads look.")
    if num_tokens <= num_sinks + recent:
        raise ValueError(f"seq_len={num_tokens} must exceed num_sinks={num_sinks} + recent={recent}.")
    pos = np.arange(num_tokens, dtype=np.int32)[None]
    total = np.zeros(layer.q.shape[2])
    for sample in range(num_samples):
        q, k = (x[sample].swapaxes(0, 1).astype(np.float32) for x in (layer.q, layer.k))  # [H or K, T, D]
        if layer.rope is not None:
            q, k = (np.asarray(layer.rope.apply(x, pos)) for x in (q, k))
        for head in range(len(q)):
            total[head] += _beyond(q[head], k[head * num_kv_heads // len(q)], num_sinks, recent)
    return {"beyond": (total / num_samples).reshape(num_kv_heads, -1).max(1).astype(np.float32)}


def _beyond(q: np.ndarray, k: np.ndarray, num_sinks: int, recent: int, block: int = 256) -> float:
    """Mean mass of one head, q [T, D] and k [T, D] rotated; `block` queries at a time."""
    num_tokens, mass = len(k), 0.0
    for first in range(num_sinks + recent, num_tokens, block):
        query = np.arange(first, min(first + block, num_tokens))[:, None]
        key = np.arange(num_tokens)[None]
        logits = np.where(key <= query, q[query[:, 0]] @ k.T, -np.inf)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        far = (key >= num_sinks) & (key <= query - recent)
        mass += float(((probs * far).sum(-1) / probs.sum(-1)).sum())
    return mass / (num_tokens - num_sinks - recent)


@method(
    axis="select",
    bits="16 or 32",
    source="DuoAttention, Xiao et al. 2024, arXiv:2410.10819",
    advice="Long contexts whose every part may be asked for: nothing is evicted where a head would look for it.",
    settings=("", "sparsity=0.75"),
    calibrate=calibrate,
)
def duo_attention(
    context: Context,
    *,
    sparsity: float = 0.5,
    num_sinks: int = 64,
    recent: int = 256,
    prefill: str = "exact",
    calibration: str = "auto",
    block_size: int = 16,
) -> tuple[LayerSpec, ...]:
    """Keep all tokens in retrieval heads, and only sinks and recent ones in a share `sparsity` of the model's KV heads.

    Streaming heads have no buffers for the rest. They are those that pay the least attention beyond sinks and recent
    tokens on a calibration text; the paper trains gates on passkeys instead, and releases them for its models only.
    Prompts are read exactly, as in kvpress; prefill=stored reads them as the paper does, each head as it decodes.
    A streaming head also sees up to `block_size` - 1 tokens that wait to settle. Defaults are the paper's.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} is the share of streaming heads and must be in [0, 1].")
    layout = context.layout
    made_with = {"num_sinks": num_sinks, "recent": recent}
    beyond = find(calibration, "duo_attention", made_with, layout)["beyond"]
    if beyond.shape[1] != layout.num_kv_heads:
        raise ValueError(f"the calibration is of {beyond.shape[1]} heads, not of num_kv_heads={layout.num_kv_heads}.")
    rank = np.argsort(np.argsort(beyond, axis=None, kind="stable")).reshape(beyond.shape)
    full = rank >= round(sparsity * beyond.size)

    def spec(heads: list[int]) -> LayerSpec:
        rung = exact_rung(blocks(context.max_len + num_sinks + recent, block_size))
        served = None if len(heads) == layout.num_kv_heads else tuple(heads)
        rungs = (Rung(rung.k, rung.v, rung.capacity, heads=served),) if heads else ()
        policy = Recency(num_sinks=num_sinks)
        return LayerSpec(rungs=rungs, policy=policy, window=recent, block_size=block_size, prefill=prefill)

    return tuple(spec(np.flatnonzero(layer).tolist()) for layer in full)
