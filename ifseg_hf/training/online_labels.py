"""Labels that the trained model predicts at every step, as IFSeg+ does in its last 66,000 steps (Appendix A.3).

The model of that step predicts them for the crop before its flip and its change of colours.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ifseg_hf.data.crops import CropDataset
from ifseg_hf.data.segmentation import SegmentationDataset
from ifseg_hf.training.pseudo_labels import PseudoLabelConfig, confident_labels, given_pixels, label_settings

__all__ = ["GivenLabels", "OnlineCrops", "label_online"]


class GivenLabels(SegmentationDataset):
    """
    A dataset of pseudo-labels whose masks have given labels only: `read` returns `len(names)` for all other pixels.

    Args:
        data ([`SegmentationDataset`]): read from `folder`, and perhaps restricted to some categories.
        folder (`Path`): what [`write_pseudo_labels`] made.
    """

    def __init__(self, data: SegmentationDataset, folder: Path):
        super().__init__(data.samples, data.names, data.labels, data.subsets)
        self.folder = folder
        self.config, self.keep_labels = label_settings(folder, data.names)

    def read(self, sample) -> tuple[np.ndarray, np.ndarray]:
        image, labels = super().read(sample)
        given = given_pixels(self.folder, sample, labels.shape, self.keep_labels)
        return image, np.where(given, labels, len(self.names))


class _RecordedFlip(torch.nn.Module):
    """A random flip that keeps its last input, and whether it was flipped."""

    def __init__(self, flip: torch.nn.Module):
        super().__init__()
        self.flip = flip

    def forward(self, crop: torch.Tensor) -> torch.Tensor:
        flipped = self.flip(crop)
        self.crop, self.flipped = crop, not torch.equal(flipped, crop)
        return flipped


class OnlineCrops(CropDataset):
    """
    [`CropDataset`] of [`GivenLabels`], whose samples also have the crop before augmentation.

    A sample has besides `pixel_values` and `labels`, in which `len(data.names)` stands for pixels to predict:
    `original`, float32 (3, c, c), the same crop, normalised, with neither flip nor change of colours; and `flipped`,
    bool, whether `pixel_values` and `labels` are mirrored.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.augment.flip = _RecordedFlip(self.augment.flip)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        original = (self.augment.flip.crop[0, :3] - self.mean) / self.std
        return {**sample, "original": original, "flipped": torch.tensor(self.augment.flip.flipped)}


@torch.no_grad()
def label_online(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], names: list[str], config: PseudoLabelConfig
) -> dict[str, torch.Tensor]:
    """
    Returns a batch with labels for all pixels, without `original` and `flipped`.

    A pixel without a given label gets the most probable of the categories to predict, or -100 where none has the
    probability `config.min_confidence`, as in [`confident_labels`].

    Args:
        model ([`IFSegForSemanticSegmentation`]): predicts in evaluation mode, so that no random number is drawn.
        batch: of samples of [`OnlineCrops`], perhaps with word maps.
        names: the model's categories.
        config: its `predicted` and `min_confidence` are used.
    """
    batch = dict(batch)
    training = model.training
    logits = model.eval()(pixel_values=batch.pop("original")).logits.float()
    model.train(training)
    candidates = [names.index(name) for name in config.predicted or names]
    labels = []
    for given, scores, flipped in zip(batch["labels"], logits, batch.pop("flipped"), strict=True):
        predicted = confident_labels(scores.softmax(0), given.shape, config.min_confidence, candidates)
        predicted = predicted.flip(1) if flipped else predicted
        labels.append(torch.where(given == len(names), predicted, given))
    return {**batch, "labels": torch.stack(labels)}
