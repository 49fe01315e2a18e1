"""A roofline: bytes of a cache against the time to attend to it, with the measured bandwidth as the floor."""

from collections import defaultdict
from pathlib import Path
from typing import Any


def roofline(content: dict[str, Any], path: Path) -> None:
    """Draw the attention rows of a result file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = defaultdict(list)
    for row in content.get("attention", []):
        if "median_s" in row:
            points[row["variant"]].append((row["bytes"], row["median_s"]))
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for variant, found in points.items():
        found.sort()
        axes.plot([x / 1e6 for x, _ in found], [y * 1e6 for _, y in found], "o-", label=variant, ms=4, lw=1)
    sizes = [x for found in points.values() for x, _ in found]
    speed = content.get("bandwidth", [{}])[0].get("copy_bytes_per_s")
    if sizes and speed:
        ends = [min(sizes), max(sizes)]
        label = f"device copy, {speed / 1e12:.2f} TB/s"
        axes.plot([x / 1e6 for x in ends], [x / speed * 1e6 for x in ends], "k--", label=label)
    axes.set(xscale="log", yscale="log", xlabel="cache read, MB", ylabel="time of one step, µs")
    axes.set_title(f"Decode attention, {content['device']}" + (" (rehearsal)" if content.get("rehearsal") else ""))
    axes.grid(alpha=0.3)
    if points:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
