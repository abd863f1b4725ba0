"""Training curves: loss and mean IoU over the steps of several runs. Needs matplotlib (the extra "plot")."""

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np

from ifseg_hf.visualization.colors import palette


def draw_curves(
    logs: Mapping[str, Sequence[list[dict]]], output: str | PathLike, levels: Mapping[str, float] | None = None
) -> None:
    """Draws loss and mean IoU over the steps: for each label the mean over its runs, and a band from lowest to highest.

    Args:
        logs: for each label the logs of its runs, such as those of several seeds; a log is what
            `ifseg_hf.training.log.read_log` returns, a list of `{"step": 1, "loss": 2.3, ...}`.
        output: the image file to write; its extension chooses the format.
        levels: mean IoU in per cent by name, drawn as horizontal lines for comparison.

    Raises:
        `ValueError`: the extension is of no known format.
        `ImportError`: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (label, of_label), color in zip(logs.items(), palette(len(logs)), strict=True):
        rgb = [level / 255 for level in color]
        for axes, name in ((left, "loss"), (right, "mean_iou")):
            steps, values = common_steps(of_label, name)
            values = running_mean(values, max(1, len(steps) // 20)) if name == "loss" else 100 * values
            marker = "o" if name == "mean_iou" else None
            axes.plot(steps, values.mean(0), color=rgb, linewidth=2, marker=marker, markersize=5, label=label)
            axes.fill_between(steps, values.min(0), values.max(0), color=rgb, alpha=0.2, linewidth=0)
    for name, level in (levels or {}).items():
        right.axhline(level, color="0.35", linestyle="--", linewidth=1.5)
        right.annotate(f"{name}: {level:.1f}", (0.01, level), (0, 3), right.get_yaxis_transform(), "offset points")
    for axes, title in ((left, "loss (running mean)"), (right, "mean IoU, %")):
        axes.set_title(title, fontsize=15)
        axes.set_xlabel("step", fontsize=13)
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for text in right.texts:
        text.set(fontsize=13, color="0.2")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])  # room for the label of the highest level
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=13, frameon=False)
    figure.savefig(output, dpi=110)


def common_steps(logs: Sequence[list[dict]], name: str) -> tuple[list[int], np.ndarray]:
    """The steps at which the logs of all runs have the value `name`, and the values (runs, steps)."""
    curves = [{line["step"]: line[name] for line in log if name in line} for log in logs]
    steps = sorted(set.intersection(*map(set, curves)))
    return steps, np.array([[curve[step] for step in steps] for curve in curves], dtype=float)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means (runs, steps) over the last `window` values, or over fewer at the beginning."""
    sums = np.cumsum(values, axis=1)
    sums[:, window:] -= sums[:, :-window].copy()
    return sums / np.minimum(np.arange(1, values.shape[1] + 1), window)


__all__ = ["common_steps", "draw_curves", "running_mean"]
