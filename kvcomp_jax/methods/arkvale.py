"""ArkVale, Chen et al. 2024, NeurIPS."""

from kvcomp_jax.methods.recalled import recalled
from kvcomp_jax.methods.registry import Context, method
from kvcomp_jax.retrieval import Bounds
from kvcomp_jax.spec import LayerSpec


@method(
    axis="select",
    bits="16 or 32",
    source="ArkVale, Chen et al. 2024, NeurIPS 2024",
    advice="As quest, where what matters changes slowly: few pages move a step, all heads of a layer read the same.",
    settings=("budget=512", "budget=1024", "budget=2048", "budget=4096"),
)
def arkvale(
    context: Context,
    *,
    budget: int | float = 1024,
    page_size: int | None = None,
    volume: str = "box",
    radius: str = "mean",
    n_groups: int = 1,
    sink_pages: int = 1,
    window_pages: int = 2,
    recalls: int | None = None,
    full_layers: int = 2,
    memory: str = "device",
) -> tuple[LayerSpec, ...]:
    """Keep everything, hold a budget of pages at hand that all queries read, and recall others when they rank high.

    A step brings in those of the `recalls` best pages that are not at hand, in place of the lowest; sinks and the last
    `window_pages`, the open one among them, are always at hand and count in the budget. All heads of a group of the
    `n_groups` hold the same pages, by the mean of their scores. Defaults are the paper's: boxes of the mean distance,
    one group, two layers that read everything, pages of 16 up to a budget of 1024 (or as a fraction) and of 32 above,
    and the best min(1280, budget / 2) tokens' pages less sinks and closed window pages. `volume` "ball", which the
    paper has beside the box, and the radii "max", "mean" and "center" are those of `Bounds`.
    `memory` "host" keeps the pages in host memory and copies of those at hand on the device, as the paper does.
    """
    total = context.tokens(budget)
    small = total <= 1024 or isinstance(budget, float)
    size = (16 if small else 32) if page_size is None else page_size
    if sink_pages < 0 or window_pages < 2:
        raise ValueError(f"sink_pages={sink_pages} must be >= 0 and window_pages={window_pages} >= 2: one is open.")
    if size < 1:
        raise ValueError(f"page_size={size} must be at least 1 token.")
    if recalls is None:
        recalls = max(min(1280, total // 2) // size - sink_pages - (window_pages - 1), 1)
    index = Bounds(page=size, volume=volume, radius=radius, heads=n_groups)
    sizes = {"num_sinks": sink_pages * size, "window": (window_pages - 1) * size, "block_size": size}
    return recalled(context, index, budget, full_layers=full_layers, recalls=recalls, memory=memory, **sizes)
