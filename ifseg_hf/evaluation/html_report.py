"""The report of an evaluation as one web page: scores, categories, confusions, worst and best images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ifseg_hf.evaluation.examples import Example
from ifseg_hf.evaluation.report import Evaluation, mean_titles, percent, setting_name
from ifseg_hf.visualization.colors import word_colors
from ifseg_hf.visualization.html_pages import page_file, render_page

__all__ = ["write_evaluation_report"]

_MOST_ROWS = 200  # categories in the confusion matrix
_DENSE = 24  # with more categories, the cells of the matrix have no numbers
_CONFUSIONS = 12  # rows of the table of confusions
_SECTIONS = ("summary", "categories", "confusions", "worst", "best", "settings")
_TITLES = {"worst": "Worst images", "best": "Best images"}
OTHER, NO_WORD = "other words", "no word"  # columns of the matrix


def write_evaluation_report(path: str | Path, evaluation: Evaluation, results: Mapping[str, Any]) -> Path:
    """
    Writes an evaluation as one HTML file, with styles and images inline, and returns the file.

    Args:
        path: the file, if it ends in .html; otherwise a folder, in which the file is report.html. Folders are created.
        evaluation: of [`ifseg_hf.evaluation.evaluate.evaluate_segmenter`], with `examples` for the images.
        results: content of the results.json of `ifseg evaluate`: model, dataset, settings and scores.
    """
    file = page_file(path, "report")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(evaluation_page(evaluation, results), encoding="utf-8", errors="backslashreplace")
    return file


def evaluation_page(evaluation: Evaluation, results: Mapping[str, Any]) -> str:
    """Returns the page of [`write_evaluation_report`]."""
    names, first = evaluation.names, results["results"][0]
    colors = dict(zip(names, ("#{:02x}{:02x}{:02x}".format(*color) for color in word_colors(names)), strict=True))
    matrix = next(iter(evaluation.matrices.values()))
    model, dataset = (Path(results[key]).name or results[key] for key in ("model", "dataset"))
    means = mean_titles(results["results"])
    smoothed = [setting_name(x["smoothing_neighbors"], x["smoothing_iterations"]) for x in results["results"]]
    shown = evaluation.examples
    half = (len(shown) + 1) // 2
    return render_page(
        "evaluation.html",
        title=f"{model} on {dataset}",
        lead=f"Semantic segmentation of {results['images']} images into {len(names)} words.",
        sections=[(name, _TITLES.get(name, name.capitalize())) for name in _SECTIONS],
        summary=[(f"{title}, %", percent(first[name])) for name, title in means.items()]
        + [("images", results["images"]), ("seconds, last run", results["seconds"])],
        means_titles=list(means.values()),
        means=[
            (setting, [percent(result[name]) for name in means])
            for setting, result in zip(smoothed, results["results"], strict=True)
        ],
        several=len(smoothed) > 1,
        setting=smoothed[0],
        skipped=results["skipped"],
        categories=_category_rows(first["categories"], matrix, colors),
        absent=[name for name, found in first["categories"].items() if found["iou"] is None],
        **_confusion_matrix(matrix, names),
        confusions=_confusions(matrix, names),
        worst=[_example(example, colors) for example in shown[:half]],
        best=[_example(example, colors) for example in reversed(shown[half:])],
        command=results["command"],
        settings=_settings(results),
    )


def _category_rows(categories: Mapping[str, Any], matrix: np.ndarray, colors: Mapping[str, str]) -> list[dict]:
    """The rows of the categories in the truth, from best to worst."""
    total = matrix.sum()
    shares = dict(zip(categories, matrix.sum(1) / max(total, 1), strict=True))
    found = [(name, scores) for name, scores in categories.items() if scores["iou"] is not None]
    return [
        {
            "name": name,
            "color": colors[name],
            "iou": percent(scores["iou"]),
            "accuracy": percent(scores["accuracy"]),
            "share": percent(shares[name]),
        }
        for name, scores in sorted(found, key=lambda pair: -pair[1]["iou"])
    ]


def _confusion_matrix(matrix: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Column names, rows of cells and layout of the matrix, whose rows are the categories in the truth.

    Predictions of other categories are one column, and pixels without a predicted category another.
    """
    true = matrix.sum(1)
    most = np.argsort(-true, kind="stable")[:_MOST_ROWS]
    kept = np.sort(most[true[most] > 0])
    columns = [names[i] for i in kept]
    counts = matrix[np.ix_(kept, kept)]
    rest = matrix[kept, : len(names)].sum(1) - counts.sum(1)
    if rest.any():
        counts, columns = np.column_stack([counts, rest]), [*columns, OTHER]
    if matrix.shape[1] > len(names):
        counts, columns = np.column_stack([counts, matrix[kept, -1]]), [*columns, NO_WORD]
    dense = len(kept) > _DENSE
    rows = []
    for row, (i, line) in enumerate(zip(kept, counts, strict=True)):
        cells: list[dict | None] = []
        for column, count in enumerate(line):
            share = count / true[i]
            if share < 0.005:
                cells.append(None)
                continue
            title = f"true {names[i]}, predicted {columns[column]}: {percent(share)} % ({count:,} pixels)"
            cell = {"kind": "r" if column == row else "w", "alpha": f"{0.08 + 0.92 * share:.2f}", "title": title}
            cell["text"] = "" if dense else f"{100 * share:.0f}"
            if share > 0.5:
                cell["kind"] += " strong"
            cells.append(cell)
        rows.append((names[i], cells))
    return {"columns": columns, "rows": rows, "dense": dense, "hidden_rows": int((true > 0).sum()) - len(kept)}


def _confusions(matrix: np.ndarray, names: list[str]) -> list[tuple[str, str, str, str]]:
    """Truth, prediction and shares, of the truth and of all pixels, of the most frequent wrong predictions."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    columns, total, true = [*names, NO_WORD], matrix.sum(), matrix.sum(1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]
    pairs = [divmod(int(place), matrix.shape[1]) for place in order]
    return [
        (names[i], columns[j], percent(wrong[i, j] / true[i]), percent(wrong[i, j] / total))
        for i, j in pairs
        if wrong[i, j]
    ]


def _example(example: Example, colors: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows of an image."""

    def described(shares: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items()) or "no word"

    words = dict.fromkeys([*example.truth_shares, *example.predicted_shares])
    ious = {name: example.ious.get(name) for name in words}
    pictures = {key: f"data:image/jpeg;base64,{getattr(example, key)}" for key in ("image", "truth", "prediction")}
    return {
        "id": example.id,
        "score": percent(example.score),
        "width": example.width,
        "height": example.height,
        "truth_words": described(example.truth_shares),
        "predicted_words": described(example.predicted_shares),
        "words": [
            {"name": name, "color": colors[name], "iou": "not in the truth" if iou is None else percent(iou)}
            for name, iou in ious.items()
        ],
        **pictures,
    }


def _settings(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Name and value of the settings that have a value."""
    names = ("model", "baseline", "dataset", "split", "inference", "background", "threshold", "processes", "device")
    rows = [(name, results[name]) for name in names if results[name] is not None]
    rows = [(name, ", ".join(value) if isinstance(value, list) else value) for name, value in rows]
    return [*rows, *results["versions"].items()]
