"""Mean intersection over union as an `evaluate.Metric`, computed from one confusion matrix.

The paper's protocol: pixels of all images are counted together, and means are over the categories that occur in the
truth.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import numpy as np
import torch

from ifseg_hf.processing.post_processing_ifseg import NO_CATEGORY

if TYPE_CHECKING:
    from accelerate import Accelerator

_DESCRIPTION = """\
Mean intersection over union (mIoU) of semantic segmentation, with mean accuracy, the accuracy of all pixels, and both
measures of every category. Pixels of all images are counted in one confusion matrix, without pixels of the ignored
label; means are over the categories that occur in the truth.
"""
_CITATION = """\
@inproceedings{yun2023ifseg,
  title = {IFSeg: Image-free Semantic Segmentation via Vision-Language Model},
  author = {Yun, Sukmin and Park, Seong Hyeon and Seo, Paul Hongsuck and Shin, Jinwoo},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2023},
}
"""
_INPUTS = """
Maps are (height, width) arrays or tensors of whole numbers, a predicted and a true map of the same size for each
image; images may differ in size.
"""


class MeanIoU(evaluate.Metric):
    """
    Counts the pixels of each pair of a true and a predicted category, and computes [`scores`] of the counts.

    Downloads and writes no files, and memory does not grow with the number of maps. With several processes, each counts
    its images, then all call [`~MeanIoU.reduce`], then any process calls [`~MeanIoU.compute`].

    Args:
        num_labels (`int`): categories; labels are `0 ... num_labels - 1`.
        ignore_index (`int`, defaults to -100): label of reference pixels that are not counted.
        allow_no_category (`bool`, defaults to `False`): whether predictions may hold -1, for pixels without a category.
            Such a pixel counts as wrong for its true category, and as a prediction of none.

    Attributes:
        confusion_matrix (`np.ndarray` of shape `(num_labels, num_labels)`, int64): pixels so far, by true category
            (row) and predicted category (column); with `allow_no_category` a last column has the pixels without a
            predicted one. `scores(metric.confusion_matrix)` is the result so far.
    """

    def __init__(self, num_labels: int, ignore_index: int = -100, allow_no_category: bool = False):
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels}: there must be a category.")
        if 0 <= ignore_index < num_labels:
            raise ValueError(f"ignore_index={ignore_index} is one of the {num_labels} categories: choose another.")
        super().__init__()
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.confusion_matrix = np.zeros((num_labels, num_labels + allow_no_category), np.int64)

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.List(datasets.List(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": maps, "references": maps}),
            reference_urls=["https://arxiv.org/abs/2303.14396"],
        )

    def _build_data_dir(self) -> None:
        """Makes no folder; the base class makes one for the maps that it collects in files."""

    def add(self, *, prediction, reference) -> None:
        """Counts the pixels of one image.

        Args:
            prediction, reference: arrays or tensors of shape `(H, W)`, of integers.

        Raises:
            `ValueError`: for maps of different sizes, or a label that is neither a category nor, in `reference`, the
                ignored label. No pixel of this call is then counted.
        """
        self.confusion_matrix += self._count(prediction, reference)

    def add_batch(self, *, predictions: Iterable, references: Iterable) -> None:
        """Counts the pixels of several images.

        Args:
            predictions, references: lists of maps, which may differ in size, or arrays or tensors of shape
                `(batch, H, W)`.

        Raises:
            `ValueError`: as [`~MeanIoU.add`] does, and for lists of different lengths.
        """
        predictions, references = list(predictions), list(references)
        if len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions for {len(references)} references: give one for each reference."
            )
        counts = np.zeros_like(self.confusion_matrix)
        for prediction, reference in zip(predictions, references, strict=True):
            counts += self._count(prediction, reference)
        self.confusion_matrix += counts

    def reduce(self, accelerator: "Accelerator") -> None:
        """Gives every process the sum of the counts of all. Call it once, in every process, after the last `add`."""
        counts = torch.from_numpy(self.confusion_matrix).to(accelerator.device)
        self.confusion_matrix = accelerator.reduce(counts, "sum").cpu().numpy()

    def compute(self, *, predictions=None, references=None, subsets: Mapping[str, Sequence[int]] | None = None) -> dict:
        """Returns [`scores`] of the maps added so far and resets the counts, as every metric of `evaluate` does.

        Args:
            predictions, references (*optional*): maps to add first, as in [`~MeanIoU.add_batch`].
            subsets (*optional*): see [`scores`].
        """
        if predictions is not None or references is not None:
            if predictions is None or references is None:
                raise ValueError("Give both predictions and references, or neither.")
            self.add_batch(predictions=predictions, references=references)
        result = scores(self.confusion_matrix, subsets)
        self.confusion_matrix = np.zeros_like(self.confusion_matrix)
        return result

    def _count(self, prediction, reference) -> np.ndarray:
        """Returns the confusion matrix of one image."""
        prediction, reference = _label_map(prediction, "prediction"), _label_map(reference, "reference")
        if prediction.shape != reference.shape:
            raise ValueError(
                f"A prediction of shape {prediction.shape} for a reference of shape {reference.shape}: "
                "both must have the height and width of the image."
            )
        counted, columns = reference != self.ignore_index, self.confusion_matrix.shape[1]
        none = columns > self.num_labels
        for labels, what in ((prediction, "prediction"), (reference, "reference")):
            lowest = NO_CATEGORY if none and what == "prediction" else 0
            wrong = counted & ((labels < lowest) | (labels >= self.num_labels))
            if wrong.any():
                right = f"0 ... {self.num_labels - 1}"
                if lowest < 0:
                    right += f" or, without a category, {NO_CATEGORY}"
                if what == "reference":
                    right += f" or, to be ignored, {self.ignore_index}"
                raise ValueError(f"The {what} holds label {labels[wrong][0]}; it should be one of {right}.")
        # Ignored pixels get an extra bin: cheaper than removing them from both maps.
        pairs = reference * columns + (np.where(prediction < 0, self.num_labels, prediction) if none else prediction)
        pairs[~counted] = self.confusion_matrix.size
        counts = np.bincount(pairs.ravel(), minlength=self.confusion_matrix.size + 1)
        return counts[:-1].reshape(self.confusion_matrix.shape)


def _label_map(labels, what: str) -> np.ndarray:
    """Returns an array, a tensor on any device, or nested lists as a `(H, W)` array of integers."""
    labels = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"A {what} has the shape (height, width) and whole numbers; this one has the shape {labels.shape} and the "
            f"type {labels.dtype}."
        )
    # Unsigned labels times a signed number of categories would be computed in float64.
    return labels.astype(np.int64, copy=False)


def scores(confusion_matrix: np.ndarray, subsets: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """
    Returns the scores of a confusion matrix. All are floats from 0 to 1, or nan where there is nothing to average.

    Args:
        confusion_matrix (`np.ndarray` of shape `(N, N)`, integers): pixels by true (row) and predicted (column)
            category; or of shape `(N, N + 1)`, with the pixels without a predicted category in the last column.
        subsets (*optional*): lists of categories by name, for example `{"seen": [0, 2], "unseen": [1]}`.

    Returns:
        `dict` with

        - **mean_iou**: mean of `right / (true + predicted - right)` over the categories that occur in the truth;
        - **mean_accuracy**: mean of `right / true` over the same;
        - **overall_accuracy**: share of all pixels that are right;
        - **per_category_iou**, **per_category_accuracy**: lists of N, nan for categories that do not occur;
        - **mean_iou_<name>** of each subset: mean of the same IoUs, so predictions of categories outside the subset
          count as wrong;
        - **harmonic_mean_iou** of the subsets' means, if there are exactly two subsets (hIoU of zero-shot transfer).

    Raises:
        `ValueError`: for a matrix of another shape, or a subset with an unknown category.
    """
    matrix = np.asarray(confusion_matrix)
    if matrix.ndim != 2 or matrix.shape[1] - matrix.shape[0] not in (0, 1):
        raise ValueError(
            f"A confusion matrix is square, or has one column more; this one has the shape {matrix.shape}."
        )
    right, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)[: len(matrix)]
    iou, accuracy = np.full((2, len(matrix)), np.nan)
    occurs = true > 0
    iou[occurs] = right[occurs] / (true + predicted - right)[occurs]
    accuracy[occurs] = right[occurs] / true[occurs]
    result: dict[str, Any] = {
        "mean_iou": _mean(iou),
        "mean_accuracy": _mean(accuracy),
        "overall_accuracy": float(right.sum() / matrix.sum()) if occurs.any() else float("nan"),
        "per_category_iou": iou.tolist(),
        "per_category_accuracy": accuracy.tolist(),
    }
    means = []
    for name, members in (subsets or {}).items():
        wrong = [label for label in members if not 0 <= label < len(matrix)]
        if wrong:
            raise ValueError(f'Subset "{name}" holds {wrong[0]}, which is none of the {len(matrix)} categories.')
        means.append(_mean(iou[list(members)]))
        result[f"mean_iou_{name}"] = means[-1]
    if len(means) == 2:
        result["harmonic_mean_iou"] = 2 * means[0] * means[1] / sum(means) if sum(means) else 0.0
    return result


def _mean(values: np.ndarray) -> float:
    """Returns the mean of the values that are not nan; nan if there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


__all__ = ["MeanIoU", "scores"]
