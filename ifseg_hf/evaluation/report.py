"""Results of an evaluation: scores of each smoothing setting, for JSON files and as Markdown tables."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ifseg_hf.evaluation.examples import Example
from ifseg_hf.evaluation.metrics import scores

__all__ = ["Evaluation", "Smoothing", "mean_titles", "percent", "results_table", "setting_name"]

Smoothing = tuple[int, int]  # neighbours and iterations; 0 iterations for no smoothing


@dataclass
class Evaluation:
    """Pixel counts of an evaluation.

    Args:
        names: the categories.
        matrices: for each smoothing setting an int64 (N, N) array, pixels by true (row) and predicted category; or
            (N, N + 1), with the pixels without a predicted category in the last column.
        images: number of counted images. skipped: error messages of the others. seconds: duration of the last run.
        subsets: lists of categories by name; see [`ifseg_hf.evaluation.metrics.scores`].
        examples: worst and best images, from worst to best.
    """

    names: list[str]
    matrices: dict[Smoothing, np.ndarray]
    images: int
    skipped: list[str]
    seconds: float
    subsets: dict[str, list[int]] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def scores(self, smoothing: Smoothing) -> dict[str, Any]:
        """Returns [`ifseg_hf.evaluation.metrics.scores`] of a smoothing setting."""
        return scores(self.matrices[smoothing], self.subsets)

    def results(self) -> list[dict[str, Any]]:
        """Returns the scores of every smoothing setting, ready for JSON.

        IoU and accuracy of the categories are under their names; `None` where a category does not occur.
        """
        results = []
        for neighbors, iterations in self.matrices:
            means = self.scores((neighbors, iterations))
            ious, accuracies = means.pop("per_category_iou"), means.pop("per_category_accuracy")
            categories = {
                name: {"iou": _number(iou), "accuracy": _number(accuracy)}
                for name, iou, accuracy in zip(self.names, ious, accuracies, strict=True)
            }
            setting = {"smoothing_neighbors": neighbors, "smoothing_iterations": iterations}
            results.append({**setting, **{k: _number(x) for k, x in means.items()}, "categories": categories})
        return results


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 6)


def percent(value: float | None) -> str:
    """Returns a share in per cent with one decimal; "-" for `None` and nan."""
    return "-" if value is None or np.isnan(value) else f"{100 * value:.1f}"


def setting_name(neighbors: int, iterations: int) -> str:
    """Returns the name of a smoothing setting in tables."""
    return f"k={neighbors}, n={iterations}" if iterations else "none"


def mean_titles(results: list[dict[str, Any]]) -> dict[str, str]:
    """Returns the titles of the means in [`Evaluation.results`] by name."""
    means = [name for name in results[0] if name not in ("smoothing_neighbors", "smoothing_iterations", "categories")]
    return {name: name.replace("_", " ").replace("iou", "IoU") for name in means}


def results_table(results: list[dict[str, Any]]) -> str:
    """Returns Markdown tables of [`Evaluation.results`]: means of every setting, categories of the first setting."""
    means = mean_titles(results)
    lines = [f"| smoothing | {' | '.join(means.values())} |", "|---" * (len(means) + 1) + "|"]
    for result in results:
        setting = setting_name(result["smoothing_neighbors"], result["smoothing_iterations"])
        lines.append(f"| {setting} | {' | '.join(percent(result[name]) for name in means)} |")
    first = results[0]
    setting = setting_name(first["smoothing_neighbors"], first["smoothing_iterations"])
    lines += ["", f"| category (smoothing: {setting}) | IoU | accuracy |", "|---|---|---|"]
    for name, category in first["categories"].items():
        escaped = name.replace("|", "\\|")
        lines.append(f"| {escaped} | {percent(category['iou'])} | {percent(category['accuracy'])} |")
    return "\n".join(lines) + "\n"
