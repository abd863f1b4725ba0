"""Mean IoU of a segmenter on images with masks (method: section 4 of the paper, whole-image inference).

Images are read one by one, images of equal size run as a batch, and every smoothing setting is counted in the same
pass: the model runs once per image. The counts are kept on disk, so that a stopped evaluation can be resumed, with any
number of processes, without counting an image twice.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from ifseg_hf.data.image_files import SampleError, check_on_error
from ifseg_hf.data.segmentation import SegmentationDataset
from ifseg_hf.evaluation.cosine import COSINE
from ifseg_hf.evaluation.counts import Counts
from ifseg_hf.evaluation.examples import ExtremeImages, extremes
from ifseg_hf.evaluation.metrics import MeanIoU, scores
from ifseg_hf.evaluation.report import Evaluation, Smoothing, setting_name
from ifseg_hf.evaluation.segmenter import Segmenter, load_segmenter
from ifseg_hf.processing.post_processing_ifseg import NO_CATEGORY, check_threshold, patch_labels, smoothing_sweep
from ifseg_hf.processing.segmenter_ifseg import IFSegSegmenter
from ifseg_hf.visualization.overlays import overlay, save_mask, side_by_side

__all__ = [
    "COSINE",
    "Evaluation",
    "IFSegSegmenter",
    "MeanIoU",
    "Smoothing",
    "evaluate_segmenter",
    "load_segmenter",
    "scores",
    "setting_name",
]

SAVE_EVERY = 30.0  # seconds between two saves of the counts
_BUFFERED = 256 * 2**20  # bytes of images and masks in memory that wait for others of their size


def fingerprint(segmenter: Segmenter) -> str:
    """Returns a hash of a segmenter's weights, by which a resumed evaluation notices that the model has changed."""
    digest = hashlib.sha256()
    for name, value in sorted(segmenter.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def evaluate_segmenter(
    segmenter: Segmenter,
    data: SegmentationDataset,
    smoothing: Sequence[Smoothing] | None = None,
    batch_size: int = 8,
    state_dir: str | Path | None = None,
    on_error: str = "fail",
    limit: int | None = None,
    predictions_dir: str | Path | None = None,
    overlays_dir: str | Path | None = None,
    overlays: int = 0,
    progress: bool = False,
    threshold: float | None = None,
    examples: int = 0,
) -> Evaluation:
    """
    Segments every image of a dataset and counts the pixels of each pair of a true and a predicted category.

    Args:
        segmenter: result of [`load_segmenter`], its words set to `data.names` in the same order. Pixels that it gives
            to a background beyond these names belong to no category.
        data: images, masks and names.
        smoothing: pairs of neighbours and iterations, each counted separately; (k, 0) does not smooth. Default: the
            segmenter's own setting.
        batch_size: images of one size per batch. It changes no number.
        state_dir: where the counts are kept; a second run with the same model, data and settings resumes there.
            Needed with several processes, on a disk that all of them see.
        on_error: "skip" leaves out images that cannot be read, "fail" raises [`SampleError`] at the first.
        limit: evaluate only the first images, this many.
        predictions_dir: folder for a PNG of each image's predicted labels (first setting), named after the image.
        overlays_dir, overlays: folder for a PNG of image, truth and prediction in a row, and how many images get one.
        threshold: pixels whose category has a lower probability belong to no category; see [`patch_labels`]. They count
            as wrong for their true category, and as a prediction of none.
        examples: how many best and how many worst images, by their mean IoU (first setting), to return as pictures.
        progress: whether to show a bar with the mean IoU so far (of this process and the first setting).

    Returns:
        The [`Evaluation`], over all processes, in every process.

    Raises:
        `ValueError`: there is no image, a setting is out of range, or `state_dir` holds another evaluation.
    """
    smoothing = _checked_smoothing([segmenter.smoothing] if smoothing is None else smoothing)
    check_threshold(threshold)
    check_on_error(on_error)
    state = PartialState()
    if state.num_processes > 1 and state_dir is None:
        raise ValueError("Several processes share their counts in a folder: give state_dir.")
    files = _PredictionFiles(data.names, predictions_dir, overlays_dir, overlays)
    total = _size(data, limit)
    settings: dict[str, Any] = {"smoothing": smoothing, "names": data.names, "on_error": on_error, "limit": limit}
    settings |= {"model": fingerprint(segmenter) if state_dir else "", "images": total}
    settings |= {"segmenter": type(segmenter).__name__, "inference": segmenter.inference}
    settings |= {"threshold": threshold, "background": segmenter.background}
    without = threshold is not None or bool(segmenter.background)
    folder, extreme = Path(state_dir) if state_dir else None, ExtremeImages(data.names, examples)
    counts = Counts(folder, settings, smoothing, len(data.names), without, extreme)
    samples = _samples(data, counts, on_error, limit, state.process_index, state.num_processes)
    started = saved = time.monotonic()
    bar = tqdm(
        total=None if total is None else len(range(state.process_index, total, state.num_processes)),
        unit="image",
        mininterval=1,
        disable=not (progress and state.is_local_main_process),
    )
    with bar:
        for batch in _equal_sizes(samples, batch_size, bar.update):
            _count_batch(segmenter, batch, counts, files, threshold)
            if bar.n and not bar.disable:
                bar.set_postfix(mIoU=f"{100 * scores(counts.metrics[smoothing[0]].confusion_matrix)['mean_iou']:.1f}")
            if time.monotonic() - saved > SAVE_EVERY:
                counts.save()
                saved = time.monotonic()
    counts.save()
    matrices, images, skipped = counts.total()
    if not images:
        raise ValueError(f"No image could be counted{': ' + skipped[0] if skipped else ''}.")
    shown = extremes(counts.examples(), examples)
    return Evaluation(data.names, matrices, images, skipped, time.monotonic() - started, data.subsets, shown)


@dataclass
class _Sample:
    index: int
    id: str
    image: np.ndarray
    truth: np.ndarray

    @property
    def bytes(self) -> int:
        return self.image.nbytes + self.truth.nbytes


def _checked_smoothing(smoothing: Sequence[Smoothing]) -> list[Smoothing]:
    """Returns the distinct settings, each without smoothing as (1, 0). Raises `ValueError` if one is out of range."""
    smoothing = list(dict.fromkeys((1, 0) if n == 0 else (k, n) for k, n in smoothing))
    if not smoothing or any(k < 1 or n < 0 for k, n in smoothing):
        raise ValueError(f"smoothing={smoothing}: give pairs of at least 1 neighbour and 0 iterations.")
    return smoothing


def _size(data: SegmentationDataset, limit: int | None) -> int | None:
    """Returns the number of images of a dataset; `None` if it is unknown, as for streamed datasets."""
    try:
        count = len(data.samples)
    except TypeError:
        return limit
    return count if limit is None else min(count, limit)


def _samples(
    data: SegmentationDataset, counts: Counts, on_error: str, limit: int | None, rank: int, world: int
) -> Iterator[_Sample | None]:
    """Yields this process' images that are still to be counted, and `None` for each of its other images."""
    for index, row in enumerate(data.samples):
        if limit is not None and index >= limit:
            return
        if index % world != rank:
            continue
        if index in counts.earlier:
            yield None
            continue
        try:
            image, truth = data.read(row)
        except SampleError as error:
            if on_error == "fail":
                counts.save()
                raise
            counts.skipped[index] = str(error)
            yield None
            continue
        small = np.int16 if len(data.names) < 2**15 else np.int64  # a sample may wait in memory for others of its size
        yield _Sample(index, str(row["id"]), image, truth.astype(small, copy=False))


def _equal_sizes(
    samples: Iterator[_Sample | None], batch_size: int, update: Callable[[int], Any]
) -> Iterator[list[_Sample]]:
    """
    Yields batches of images of equal size, and calls `update` with the number of images after each batch.

    A batch is smaller than `batch_size` at the end, and where more than `_BUFFERED` bytes would wait: then the size
    with most bytes is next.
    """
    waiting: dict[tuple[int, ...], list[_Sample]] = {}
    size = 0
    for sample in samples:
        if sample is None:
            update(1)
            continue
        group = waiting.setdefault(sample.image.shape, [])
        group.append(sample)
        size += sample.bytes
        if size > _BUFFERED:
            group = max(waiting.values(), key=lambda samples: sum(sample.bytes for sample in samples))
        elif len(group) < batch_size:
            continue
        size -= sum(sample.bytes for sample in group)
        yield waiting.pop(group[0].image.shape)
        update(len(group))
    for group in waiting.values():
        yield group
        update(len(group))


def _count_batch(
    segmenter: Segmenter, batch: list[_Sample], counts: Counts, files: "_PredictionFiles", threshold: float | None
) -> None:
    """Segments the images of a batch and counts their pixels under every smoothing setting."""
    outputs = segmenter(segmenter.preprocess([sample.image for sample in batch]))
    for sample, swept in zip(batch, smoothing_sweep(outputs, counts.smoothing), strict=True):
        first = None
        for setting, patches in zip(counts.smoothing, swept, strict=True):  # a map at a time, which may be large
            labels = patch_labels(patches, sample.truth.shape, setting[1] > 0, threshold).cpu()
            labels[labels >= len(files.names)] = NO_CATEGORY  # background beyond the categories of the dataset
            counts.metrics[setting].add(prediction=labels, reference=sample.truth)
            first = labels if first is None else first
        counts.images.append(sample.index)
        counts.extreme_images.add(sample.index, sample.id, sample.image, sample.truth, first.numpy())
        files.save(sample, first)


class _PredictionFiles:
    """Folders for predictions and overlays; see [`evaluate_segmenter`]."""

    def __init__(self, names: list[str], predictions_dir, overlays_dir, overlays: int):
        self.names, self.overlays = names, overlays
        self.predictions_dir, self.overlays_dir = (path and Path(path) for path in (predictions_dir, overlays_dir))
        for folder in (self.predictions_dir, self.overlays_dir):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)

    def save(self, sample: _Sample, labels: torch.Tensor) -> None:
        name = f"{sample.id}.png"  # with the sub-folder of the image
        if self.predictions_dir is not None:
            (self.predictions_dir / name).parent.mkdir(parents=True, exist_ok=True)
            save_mask(labels, self.predictions_dir / name, self.names)
        if self.overlays_dir is not None and sample.index < self.overlays:
            (self.overlays_dir / name).parent.mkdir(parents=True, exist_ok=True)
            _comparison(sample, labels, self.names).save(self.overlays_dir / name)


def _comparison(sample: _Sample, labels: torch.Tensor, names: list[str]) -> Image.Image:
    """Returns image, ground truth and prediction in a row, the last two with legends."""
    image = Image.fromarray(sample.image)
    images = [image, overlay(image, sample.truth, names), overlay(image, labels, names)]
    return side_by_side(images, ["image", "ground truth", "prediction"])
