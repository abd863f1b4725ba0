"""The images that a segmenter is best and worst at, kept as small pictures while an evaluation runs."""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from ifseg_hf.visualization.html_pages import jpeg
from ifseg_hf.visualization.overlays import overlay, shares

__all__ = ["Example", "ExtremeImages", "image_ious", "read_examples"]

_SIDE = 480  # the longer side of a picture


@dataclass
class Example:
    """An image of an evaluation with its scores, and small pictures of it, its truth and its prediction.

    Attributes:
        index, id: position and name in the dataset.
        score: mean of the IoUs over the categories in the truth of the image, from 0 to 1.
        ious: IoU of each category in the truth or the prediction by name; None for those that are not in the truth.
        truth_shares, predicted_shares: share of all pixels of each category by name, largest first.
        width, height: of the pictures.
        image, truth, prediction: JPEG files in base64; the last two are overlays without legends.
    """

    index: int
    id: str
    score: float
    ious: dict[str, float | None]
    truth_shares: dict[str, float]
    predicted_shares: dict[str, float]
    width: int
    height: int
    image: str
    truth: str
    prediction: str


class ExtremeImages:
    """
    Keeps the `count` best and the `count` worst images of those that are added, by their mean IoU.

    The pictures of an image are drawn when it is among them, so that memory does not grow with the number of images. Of
    images with equal scores the earlier one in the dataset counts as worse.

    Args:
        names: the categories.
        count: how many best and how many worst images to keep; 0 keeps none.
    """

    def __init__(self, names: Sequence[str], count: int):
        self.names, self.count = list(names), count
        self.kept: list[Example] = []

    def add(self, index: int, id: str, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Adds an image.

        Args:
            image: RGB, uint8 (H, W, 3).
            truth, prediction: categories (H, W). Values of the truth that are no category are ignored, and values of
                the prediction that are none are wrong. An image without any category in its truth has no score.
        """
        if not self.count:
            return
        ious, in_truth = image_ious(prediction, truth, len(self.names))
        if not in_truth.any():
            return
        score = float(ious[in_truth].mean())
        if self._is_extreme(score, index):
            found = np.flatnonzero(~np.isnan(ious))  # in the truth or the prediction
            example = Example(
                index,
                id,
                score,
                {self.names[i]: float(ious[i]) if in_truth[i] else None for i in found},
                shares(truth, self.names),
                shares(prediction, self.names),
                **_pictures(image, truth, prediction, self.names),
            )
            self.kept = extremes([*self.kept, example], self.count)

    def _is_extreme(self, score: float, index: int) -> bool:
        worse = sum((example.score, example.index) < (score, index) for example in self.kept)
        return min(worse, len(self.kept) - worse) < self.count

    def to_json(self) -> str:
        """The kept images as JSON, for [`read_examples`]."""
        return json.dumps([asdict(example) for example in self.kept])


def extremes(examples: Iterable[Example], count: int) -> list[Example]:
    """Returns the `count` worst and the `count` best of the images, each once, from worst to best."""
    ranked = sorted(examples, key=lambda example: (example.score, example.index))
    return [*ranked[:count], *ranked[max(count, len(ranked) - count) :]]


def read_examples(texts: Iterable[str]) -> list[Example]:
    """Returns the images in the JSON of several processes or runs."""
    return [Example(**example) for text in texts for example in json.loads(text)]


def image_ious(prediction: np.ndarray, truth: np.ndarray, categories: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns the IoU of each category in one image, and whether the category is in its truth; two arrays (categories,).

    The IoU is nan for categories that are neither in truth nor prediction. Pixels whose truth is no category are not
    counted.
    """
    counted = (truth >= 0) & (truth < categories)
    truth, prediction = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
    right = np.bincount(truth[truth == prediction], minlength=categories)
    true = np.bincount(truth, minlength=categories)
    predicted = np.bincount(prediction[(prediction >= 0) & (prediction < categories)], minlength=categories)
    union = true + predicted - right
    ious = np.full(categories, np.nan)
    ious[union > 0] = right[union > 0] / union[union > 0]
    return ious, true > 0


def _pictures(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """The attributes of [`Example`] from `width` on."""
    picture = Image.fromarray(image)
    scale = min(1.0, _SIDE / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    drawn = {"image": picture}
    for name, labels in (("truth", truth), ("prediction", prediction)):
        resized = Image.fromarray(np.asarray(labels, np.int32)).resize(size, Image.Resampling.NEAREST)
        drawn[name] = overlay(picture, np.asarray(resized), names, legend=False)
    files = {name: base64.b64encode(jpeg(drawing)).decode() for name, drawing in drawn.items()}
    return {"width": size[0], "height": size[1], **files}
