"""Plots of result files: attention against the memory's speed, prompts and decode steps of models, TPU predictions."""

from collections import defaultdict
from pathlib import Path
from typing import Any

_STYLES = {"cpu": "o-", "gpu": "o-", "hopper": "D-", "blocked": "s:", "reference": "v:", "f32": "^--", "bf16": "^--"}


def roofline(content: dict[str, Any], path: Path) -> None:
    """Draw the attention rows of a result file, and its decode steps if it has any."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row for row in content.get("decode_steps", []) if "median_s" in row]
    figure, panels = plt.subplots(1, 2 if steps else 1, figsize=(13 if steps else 8, 5.5), layout="constrained",
                                  squeeze=False, width_ratios=[3, 2] if steps else None)  # fmt: skip
    _attention(panels[0, 0], content, plt.get_cmap("tab20"))
    if steps:
        _steps(panels[0, 1], steps)
    rehearsal = " (rehearsal)" if content.get("rehearsal") else ""
    cores = f", {content['cores']} cores" if "cores" in content else ""
    figure.suptitle(f"{content['device']}{cores}, JAX {content['versions']['jax']}{rehearsal}")
    figure.savefig(path, dpi=130)


def whole_model(content: dict[str, Any], path: Path) -> None:
    """Draw the decode steps and the prompts of a result file, whichever it has."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row for row in content.get("decode_steps", []) if "median_s" in row]
    prompts = content.get("prompts", [])
    height = 1.2 + 0.32 * max(len(steps), len(prompts))
    figure, panels = plt.subplots(1, bool(steps) + bool(prompts), figsize=(13, height), layout="constrained",
                                  squeeze=False)  # fmt: skip
    if steps:
        _steps(panels[0, 0], steps)
    if prompts:
        _prompts(panels[0, -1], prompts)
    figure.suptitle(f"{content['device']}, {content['cores']} cores, JAX {content['versions']['jax']}")
    figure.savefig(path, dpi=130)


def tpu_roofline(content: dict[str, Any], path: Path) -> None:
    """Draw which share of each chip's bandwidth the bundles of each kernel leave, by operation and case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in content["rows"] if "head_dim-64" not in row["case"]]
    cases = {name: list(dict.fromkeys(row["case"] for row in rows if row["operation"] == name))
             for name in dict.fromkeys(row["operation"] for row in rows)}  # fmt: skip
    figure, panels = plt.subplots(len(cases), 1, figsize=(9, 1.2 + 0.36 * sum(map(len, cases.values()))), sharex=True,
                                  layout="constrained", squeeze=False,
                                  height_ratios=[len(found) + 0.6 for found in cases.values()])  # fmt: skip
    for axes, (operation, names) in zip(panels[:, 0], cases.items(), strict=True):
        for i, chip in enumerate(content["chips"]):
            share = {row["case"]: 100 * row["share_of_bandwidth"] for row in rows
                     if (row["operation"], row["chip"]) == (operation, chip)}  # fmt: skip
            places = [n + 0.38 * (i - 0.5 * (len(content["chips"]) - 1)) for n in range(len(names))]
            bars = axes.barh(places, [share.get(name, 0.0) for name in names], height=0.36, label=chip)
            axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=7)
        axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 108), title=operation)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    panels[0, 0].legend(loc="lower right")
    panels[-1, 0].set(xlabel="bandwidth that the schedule allows, % (predicted, not measured)")
    figure.suptitle(f"Decode attention on TPUs, compiled ahead of time, JAX {content['meta']['versions']['jax']}")
    figure.savefig(path, dpi=130)


def _attention(axes: Any, content: dict[str, Any], colours: Any) -> None:
    points = defaultdict(list)
    for row in content.get("attention", []):
        if "median_s" in row:
            points[row["variant"]].append((row["bytes"] / 1e6, row["median_s"] * 1e3))
    for i, (variant, found) in enumerate(points.items()):
        style = _STYLES[variant.split("-")[0]]
        axes.plot(*zip(*sorted(found), strict=True), style, label=variant, ms=4, lw=1, color=colours(i))
    sizes = [x for found in points.values() for x, _ in found]
    bandwidth = content.get("bandwidth", [{}])[0]
    speed = max((bandwidth.get(f"{way}_bytes_per_s", 0) for way in ("copy", "read")), default=0)
    if sizes and speed:
        ends = [min(sizes), max(sizes)]
        label = f"memory at {speed / 1e9:.0f} GB/s"
        axes.plot(ends, [x * 1e6 / speed * 1e3 for x in ends], "k-", lw=2, alpha=0.5, label=label)
    axes.set(xscale="log", yscale="log", xlabel="cache read, MB", ylabel="time, ms", title="Decode attention")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)


def _steps(axes: Any, steps: list[dict[str, Any]]) -> None:
    bars, middle = _bars(axes, steps, 1e3)
    axes.bar_label(bars, [f" {middle[0] / m:.2f}×" for m in middle], label_type="center", color="white")
    rows = f"{steps[0]['batch']} rows of " if steps[0]["batch"] > 1 else ""
    title = f"{steps[0]['model']}, {rows}{steps[0]['context']:,} tokens"
    axes.set(xlabel="ms a step (lower is better)", title=title)


def _prompts(axes: Any, prompts: list[dict[str, Any]]) -> None:
    bars, middle = _bars(axes, prompts, 1)
    labels = [f"+{m / middle[0] - 1:.0%}".replace("+-", "−") for m in middle]
    labels = [f"{text}, {row['peak_bytes'] / 1e6:.0f} MB" for text, row in zip(labels, prompts, strict=True)]
    axes.bar_label(bars, labels, label_type="center", color="white")
    title = f"Reading {prompts[0]['tokens']:,} tokens; most held beside weights"
    axes.set(xlabel="seconds (lower is better)", title=title)


def _bars(axes: Any, rows: list[dict[str, Any]], unit: float) -> tuple[Any, list[float]]:
    middle = [row["median_s"] * unit for row in rows]
    low, high = zip(*(row["quartiles_s"] for row in rows), strict=True)
    spread = [[m - unit * x for m, x in zip(middle, low, strict=True)],
              [unit * x - m for m, x in zip(middle, high, strict=True)]]  # fmt: skip
    bars = axes.barh([row["method"] for row in rows], middle, xerr=spread, color="tab:blue", height=0.6, capsize=3)
    axes.invert_yaxis()
    return bars, middle
