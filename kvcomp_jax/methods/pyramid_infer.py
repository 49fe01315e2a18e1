"""PyramidInfer, Yang et al. 2024, arXiv:2405.12532."""

from kvcomp_jax.budgets import falling, nested
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.policies import TailVote
from kvcomp_jax.spec import LayerSpec, exact_rung


@method(
    axis="select",
    bits="16 or 32",
    source="PyramidInfer, Yang et al. 2024, arXiv:2405.12532",
    advice="Prompts too long to read whole: deeper layers read, compute and keep fewer tokens.",
    settings=("", "decay=0.8", "decay=0.61,interval=4"),
)
def pyramid_infer(
    context: Context,
    *,
    decay: float = 0.9,
    interval: int = 1,
    schedule: str = "cosine",
    recent: float = 0.2,
    min_context: int = 64,
    num_first: int = 4,
    newest: float = 1.2,
    thin: float = 0.9,
    thin_decay: float = 0.1,
    exceed: int = 16,
) -> tuple[LayerSpec, ...]:
    """Every `interval` layers, pass on only those tokens of the prompt's context to which its `recent` share attends.

    What a layer does not get it neither computes nor caches. The context shrinks by a factor that falls from 1 in the
    first layer to `decay` in the last. Of `exceed` generated tokens that leave the recent ones, a layer keeps the share
    `thin`, times a factor that falls from 1 to `thin_decay`; the prompt's are all kept. Recent tokens are `recent` of
    the prompt, and do not grow with the text as in the released code. Defaults are its for 7B and 8B models; for 13B
    decay=0.8,interval=2, for 70B interval=3. Layers need to see the whole prompt, and it is read in one pass.
    """
    layout, length = context.layout, context.prompt_len
    if any(layout.sliding_windows):
        raise ValueError("layers with sliding windows cannot be handed a part of the prompt; take pyramid_kv.")
    if length is None:
        raise ValueError("which tokens are handed on depends on the prompt's length: pass prompt_len.")
    if not 0 <= recent <= 1 or not 0 < thin <= 1 or exceed < 1:
        raise ValueError(f"recent={recent} must be in [0, 1], thin={thin} in (0, 1] and exceed={exceed} at least 1.")
    tail, layers = min(1 + int(recent * length), length), layout.num_layers
    options = {"decay": decay, "interval": interval, "schedule": schedule}
    contexts = nested(length - tail, layers, least=min(min_context, length - tail), **options)
    policy = TailVote(num_queries=tail, num_first=num_first, newest=newest)

    def layer(i: int, tokens: int) -> LayerSpec:
        share = thin * falling(i / layers, thin_decay)
        kept = max(int(exceed * share), 1)
        own = min(context.later, tail + exceed)  # the prompt's tail that newer tokens push out is all kept
        reserve = own + -(-(context.later - own) // exceed) * kept
        rung = exact_rung(max(tokens, 1), reserve=reserve)
        return LayerSpec(rungs=(rung,), policy=policy, window=tail, block_size=exceed, keep=kept / exceed)

    return tuple(layer(i, tokens) for i, tokens in enumerate(contexts))
