"""ClusterKV, Liu et al. 2024, arXiv:2412.03213."""

from kvcomp_jax.methods.recalled import recalled
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.retrieval import Centroids
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="ClusterKV, Liu et al. 2024, arXiv:2412.03213",
    advice="As quest, where what belongs together lies scattered in the text; prompts cost a clustering.",
    settings=("budget=1024", "budget=2048", "budget=512,window=320,window_clusters=8"),
)
def cluster_kv(
    context: Context,
    *,
    budget: int | float = 1024,
    clusters: int | None = None,
    iterations: int = 20,
    num_sinks: int = 16,
    window: int = 320,
    window_clusters: int = 8,
    full_layers: int = 2,
    memory: str = "device",
    heads: str = "query",
    seed: int = 0,
) -> tuple[LayerSpec, ...]:
    """Keep everything, cluster keys by direction, and read whole clusters by the product of query and mean key.

    `budget` counts sinks and clustered tokens, as in the paper; tokens since the last `window` that was clustered are
    read on top of it. `clusters` None is one for every 80 tokens of a prompt. Defaults are the paper's: each query head
    selects for itself ("kv": the query heads of a KV head together), 20 rounds of k-means, 16 sinks, two layers that
    read everything. Draws are seeded. `memory` "host" keeps the clustered tokens in host memory and, on the device,
    copies of those that the last step read, `budget` for each query head (or KV head); a step brings those of its own
    that are not among them, in place of those it does not read. That is the paper's cluster cache with R = 1.
    """
    if clusters is not None and clusters < 1:
        raise ValueError(f"clusters={clusters} must be at least 1.")
    if window < 1 or not 1 <= window_clusters <= window:
        raise ValueError(f"window={window} must be at least 1 and window_clusters={window_clusters} in [1, {window}].")
    index = Centroids(
        clusters=clusters or max((context.prompt_len or context.max_len) // 80, 1),
        tokens_per_cluster=80 if clusters is None else None,
        block_clusters=window_clusters,
        iterations=iterations,
        heads=heads,
        seed=seed,
    )
    sizes = {"num_sinks": num_sinks, "block_size": window, "counted": 0}
    return recalled(context, index, budget, full_layers=full_layers, memory=memory, **sizes)
