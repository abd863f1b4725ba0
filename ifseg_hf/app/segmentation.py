"""Segmentation for the page: models shared by all visitors, and outputs kept for new post-processing."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import ModelOutput

from ifseg_hf.app.images import fit
from ifseg_hf.evaluation.segmenter import load_segmenter
from ifseg_hf.processing.post_processing_ifseg import NO_CATEGORY, patch_labels, patch_scores, resize_scores
from ifseg_hf.processing.segmenter_ifseg import IFSegSegmenter

__all__ = ["SHOWN_PIXELS", "Models", "PostProcessing", "Segmentation", "segment_image"]

SHOWN_PIXELS = 800_000
"""Images are shown with at most this number of pixels; downloads have the size of the image."""
_ROUNDING = 1e-6  # of probabilities, as in patch_labels


@dataclass(frozen=True)
class PostProcessing:
    """Settings of post-processing: neighbours and iterations of the smoothing, and the threshold (0: none)."""

    neighbors: int
    iterations: int
    threshold: float = 0.0


@dataclass
class Segmentation:
    """The model's outputs for one image, from which masks are made without running the model again.

    Attributes:
        outputs: on the CPU, `logits` (1, labels, h, w), `image_features` (1, channels, h, w) and `patch_mask`
            (1, h, w).
        names: of the labels.
        image: the displayed image, mode RGB.
        path: the uploaded file; size: (width, height) of the image in it, once read.
        tuned: whether the model was tuned on these words.
    """

    outputs: ModelOutput
    names: list[str]
    image: Image.Image
    path: str
    size: tuple[int, int]
    tuned: bool

    def label_map(self, how: PostProcessing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Returns labels, best labels and their probabilities, each (H, W) in the size of the shown image.

        Labels are int64 indices of `names`, -1 where the probability (float32) is below the threshold. The best labels
        are those without a threshold.
        """
        scores = self._scores(how)
        best = patch_labels(scores, self.image.size[::-1], bool(how.iterations))
        probabilities = scores if how.iterations else scores.softmax(0)
        likely = torch.zeros(best.shape)
        for label in best.unique().tolist():
            mask = best == label
            likely[mask] = resize_scores(probabilities[label, None], tuple(best.shape))[0][mask]
        labels = best.masked_fill(likely < how.threshold - _ROUNDING, NO_CATEGORY)
        return labels.numpy(), best.numpy(), likely.numpy()

    def full_size_labels(self, how: PostProcessing) -> np.ndarray:
        """Returns the labels (H, W), int64, in the size of the image in the file; -1 as in [`label_map`]."""
        return patch_labels(self._scores(how), self.size[::-1], bool(how.iterations), how.threshold or None).numpy()

    def _scores(self, how: PostProcessing) -> torch.Tensor:
        (scores,) = patch_scores(self.outputs, how.neighbors, how.iterations)
        return scores


class Models:
    """Loaded models by folder, shared by all visitors: words are arguments of each call and never set on a model.

    Args:
        device: where the models compute.
        trust_remote_code: run the code saved with a model of another backbone.
        keep: how many models stay in memory; the one used longest ago is dropped first.
    """

    def __init__(self, device: str | torch.device = "cpu", trust_remote_code: bool = False, keep: int = 3):
        self.device, self.trust_remote_code, self.keep = device, trust_remote_code, keep
        self._loaded: OrderedDict[str, tuple[IFSegSegmenter, threading.Lock]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, folder: str | Path) -> tuple[IFSegSegmenter, threading.Lock]:
        """Returns the segmenter of a model, and the lock to hold while it computes. Raises `ValueError`."""
        with self._lock:
            key = str(folder)
            if key not in self._loaded:
                segmenter = load_segmenter(
                    folder, device=self.device, trust_remote_code=self.trust_remote_code, untuned=True
                )
                self._loaded[key] = segmenter, threading.Lock()
            self._loaded.move_to_end(key)
            while len(self._loaded) > self.keep:
                self._loaded.popitem(last=False)
            return self._loaded[key]


def segment_image(
    models: Models,
    folder: str | Path,
    image: Image.Image,
    path: str,
    words: list[str] | None,
    background: str | list[str] | None,
    tuned: bool,
) -> Segmentation:
    """Runs a model on an image, once.

    Args:
        folder: of the model.
        image: mode RGB. path: its file.
        words: `None` for those that the model was tuned on, with their background.
        background: as [`IFSegSegmenter.encode_words`] takes it.
        tuned: whether the model was tuned on the words.

    Raises:
        `ValueError`: the model cannot be loaded, or its tokenizer does not know a word.
    """
    segmenter, lock = models.get(folder)
    encoded = segmenter.encode_words(words, background=background)
    inputs = segmenter.preprocess([np.asarray(image)])
    with lock:
        outputs: Any = segmenter(inputs, segmenter.word_inputs(encoded))
    kept = {name: outputs[name].cpu() for name in ("logits", "image_features", "patch_mask")}
    names = list(encoded["id2label"].values())
    return Segmentation(ModelOutput(kept), names, fit(image, SHOWN_PIXELS), path, image.size, tuned)
