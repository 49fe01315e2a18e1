"""Quest, Tang et al. 2024, arXiv:2406.10774."""

from kvcomp_jax.methods.recalled import recalled
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.retrieval import Bounds
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="Quest, Tang et al. 2024, arXiv:2406.10774",
    advice="Long contexts of which later questions need any part: nothing is evicted, so it saves reads and no bytes.",
    settings=("budget=256", "budget=512", "budget=1024"),
)
def quest(
    context: Context,
    *,
    budget: int | float = 1024,
    page_size: int = 16,
    full_layers: int = 2,
    heads: int | str = "query",
) -> tuple[LayerSpec, ...]:
    """Keep everything; read the pages whose keys could match the query best, by minimum and maximum of each channel.

    The open page is always read and counts in the budget; one further page may wait beside it for its turn to be
    summarised. A prompt reads itself whole. Each token of a later turn reads what it would as a step of its own, where
    the paper's code reads all. Defaults are the paper's: pages of 16, each query head for itself, two layers that read
    everything. `heads` says who reads the same: "query", "kv" (the query heads of a KV head), or a number of groups.
    """
    index = Bounds(page=page_size, heads=heads)
    return recalled(context, index, budget, full_layers=full_layers, block_size=page_size)
