"""Mean IoU of a segmenter on photos with masks (method: section 4 of the paper, whole-image inference).

Photos are read one by one, those of equal size run together, and every smoothing setting that is asked for is counted
in the same pass: trunk and transformer run once a photo. What was counted is kept on the disk, so that an evaluation
that was stopped goes on, in any number of processes, and counts no photo twice.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from ifseg_hf.data.segmentation import SampleError, SegmentationDataset
from ifseg_hf.evaluation.baselines import BASELINES, load_baseline
from ifseg_hf.evaluation.metrics import MeanIoU, scores
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation, IFSegSegmentationOutput
from ifseg_hf.pretrained import resolve_model
from ifseg_hf.processing.post_processing_ifseg import resized_argmax, smoothing_sweep
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.processing.sliding_window_ifseg import sliding_window_outputs
from ifseg_hf.visualization.overlays import overlay, save_mask, side_by_side

__all__ = [
    "Evaluation",
    "IFSegSegmenter",
    "MeanIoU",
    "evaluate_segmenter",
    "load_segmenter",
    "markdown",
    "scores",
]

COSINE = "cosine"
TEMPERATURE = 0.1  # of the cosine baseline; it matters only where smoothing averages probabilities
SAVE_EVERY = 30.0  # seconds between two states on the disk
_BUFFERED = 64  # photos in memory while they wait for others of their size

Smoothing = tuple[int, int]  # neighbours and iterations; 0 iterations for none


# Segmenters -----------------------------------------------------------------------------------------------------------


class IFSegSegmenter:
    """An IFSeg model and its processor as what [`evaluate_segmenter`] takes; see [`load_segmenter`]."""

    def __init__(self, model: IFSegForSemanticSegmentation, processor: IFSegProcessor, inference: str | None = None):
        self.model, self.processor, self.image_processor = model.eval(), processor, processor.image_processor
        self.inference = inference or ("slide" if self.image_processor.sliding_window else "whole")

    def set_words(self, categories: list[str] | dict[str, list[str]]) -> None:
        """Makes these the model's words, in the wording of the prompt that it was tuned with."""
        config = self.model.config
        unknown = config.prompt_ids is None or self.processor.ends_with_unknown(config.prompt_ids)
        self.model.set_words(**self.processor.encode_categories(categories, config.prompt, unknown))

    def preprocess(self, images: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """uint8 RGB arrays (H, W, 3) of any sizes to `pixel_values` and `pixel_mask`."""
        return self.processor(images=images, input_data_format="channels_last", return_tensors="pt")

    @torch.no_grad()
    def __call__(self, inputs: dict[str, torch.Tensor]) -> IFSegSegmentationOutput:
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        if self.inference == "whole":
            return self.model(**inputs)
        return sliding_window_outputs(self.model, **inputs, crop=self.image_processor.sliding_window)


class CosineSegmenter(IFSegSegmenter):
    """The cosine of each projected patch with each word: pre-training without encoder, decoder and tuning."""

    @torch.no_grad()
    def __call__(self, inputs: dict[str, torch.Tensor]) -> IFSegSegmentationOutput:
        outputs = super().__call__(inputs)
        patches = outputs.image_features.permute(0, 2, 3, 1)
        patches = normalize(self.model.model.encoder.image_proj(patches), dim=-1)
        _, ids, mask = self.model._words(None, None, None, patches.device)
        words = normalize(self.model.embed_words(ids, mask)[0], dim=-1)
        logits = (patches @ words.T).permute(0, 3, 1, 2) / TEMPERATURE
        return IFSegSegmentationOutput(
            logits=logits, image_features=outputs.image_features, patch_mask=outputs.patch_mask
        )


def load_segmenter(
    model: str | Path, baseline: str | None = None, device: str | torch.device = "cpu", inference: str | None = None
):
    """
    A segmenter: `set_words(categories)`, `preprocess(images)`, a call that returns logits and image features, and an
    `image_processor` that knows which smoothing the model wants.

    Args:
        model: folder or Hub id; "ifseg-ofa-nano" is the embedded checkpoint. A converted OFA is evaluated without any
            tuning: its segmentation positions start from seed 0.
        baseline: `None` for IFSeg, "cosine" for its patches against its words, "clip" or "maskclip" for
            [`load_baseline`].
        device: where it computes, in float32.
        inference: "whole" photos at once, or "slide": the mean over square crops. By default what the model's
            processor says: crops if it was trained on crops of photos.

    Raises `ValueError` or `FileNotFoundError` for what cannot be loaded.
    """
    if inference not in (None, "whole", "slide") or (baseline and inference == "slide"):
        raise ValueError(f'inference="{inference}": choose whole or slide; baselines segment whole photos.')
    if baseline in BASELINES:
        return load_baseline(baseline, model, device)
    if baseline not in (None, COSINE):
        raise ValueError(f'There is no baseline "{baseline}": choose from {", ".join((COSINE, *BASELINES))}.')
    path = resolve_model(model)
    try:
        processor = IFSegProcessor.from_pretrained(path)
        torch.manual_seed(0)
        loaded = IFSegForSemanticSegmentation.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'"{model}" is no IFSeg model that can be loaded: {" ".join(str(error).split())}'[:500]
        ) from error
    kind = IFSegSegmenter if baseline is None else CosineSegmenter
    return kind(loaded.to(device), processor, inference)


def inference_of(segmenter) -> str:
    return getattr(segmenter, "inference", "whole")


def fingerprint(segmenter) -> str:
    """A hash of a segmenter's weights: another model in the same folder is another evaluation."""
    digest = hashlib.sha256()
    for name, value in sorted(segmenter.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Counting, and what is kept of it -------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What was counted.

    Args:
        names: the categories.
        matrices: for each smoothing setting an int64 (N, N) array, pixels by true (row) and predicted category.
        images: photos counted; skipped: what was wrong with the others; seconds: in this run's loop.
        subsets: of the categories, for [`scores`].
    """

    names: list[str]
    matrices: dict[Smoothing, np.ndarray]
    images: int
    skipped: list[str]
    seconds: float
    subsets: dict[str, list[int]] = field(default_factory=dict)

    def scores(self, smoothing: Smoothing) -> dict[str, Any]:
        """See [`ifseg_hf.evaluation.metrics.scores`]."""
        return scores(self.matrices[smoothing], self.subsets)

    def results(self) -> list[dict[str, Any]]:
        """[`scores`] of every setting, ready for JSON: IoU and accuracy by name, `None` where a category is absent."""
        results = []
        for neighbors, iterations in self.matrices:
            told = self.scores((neighbors, iterations))
            ious, accuracies = told.pop("per_category_iou"), told.pop("per_category_accuracy")
            categories = {
                name: {"iou": _number(iou), "accuracy": _number(accuracy)}
                for name, iou, accuracy in zip(self.names, ious, accuracies, strict=True)
            }
            setting = {"smoothing_neighbors": neighbors, "smoothing_iterations": iterations}
            results.append({**setting, **{k: _number(x) for k, x in told.items()}, "categories": categories})
        return results


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 6)


class _Counted:
    """What this process and, in `folder`, all the others and those before it have counted.

    Every process writes a file of its own, replaced as a whole; the sum of all files is the state, so that nothing has
    to be merged, moved or deleted, which a kill could do by half.
    """

    def __init__(self, folder: Path | None, settings: dict, smoothing: Sequence[Smoothing], count: int):
        self.smoothing = list(smoothing)
        self.metrics = {setting: MeanIoU(count) for setting in self.smoothing}
        self.images: list[int] = []
        self.skipped: dict[int, str] = {}
        self.before: set[int] = set()
        self.file = None
        if folder is None:
            return
        state = PartialState()
        folder.mkdir(parents=True, exist_ok=True)
        _check_settings(folder / "settings.json", settings)
        state.wait_for_everyone()  # all have compared with what was there before
        if state.is_main_process:
            (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        parts = sorted(folder.glob("part-*.npz"))
        for part in parts:
            read = _read_part(part)
            self.before.update(read["images"].tolist(), read["skipped"].tolist())
        attempt = 1 + max((int(part.stem.split("-")[1]) for part in parts), default=0)
        state.wait_for_everyone()  # all have seen the same files
        self.file = folder / f"part-{attempt}-{state.process_index}.npz"
        self.folder = folder

    def save(self) -> None:
        if self.file is None:
            return
        content: dict[str, Any] = {f"matrix_{k}_{n}": self.metrics[k, n].confusion_matrix for k, n in self.smoothing}
        content |= {"images": np.array(self.images, np.int64), "skipped": np.array(list(self.skipped), np.int64)}
        content["messages"] = np.array(json.dumps(list(self.skipped.values())))
        with open(self.file.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **content)
            file.flush()
            os.fsync(file.fileno())
        self.file.with_suffix(".tmp").replace(self.file)

    def total(self) -> tuple[dict[Smoothing, np.ndarray], int, list[str]]:
        """Matrices, photos and what was wrong with the skipped ones, over all processes and runs."""
        if self.file is None:
            matrices = {setting: metric.confusion_matrix for setting, metric in self.metrics.items()}
            return matrices, len(self.images), list(self.skipped.values())
        PartialState().wait_for_everyone()
        parts = [_read_part(part) for part in sorted(self.folder.glob("part-*.npz"))]
        matrices = {(k, n): np.sum([part[f"matrix_{k}_{n}"] for part in parts], axis=0) for k, n in self.smoothing}
        return (
            matrices,
            sum(len(part["images"]) for part in parts),
            [m for part in parts for m in json.loads(str(part["messages"]))],
        )


def _read_part(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as part:
            return dict(part)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f'"{file}" is damaged: delete it, and its photos are counted again.') from error


def _check_settings(file: Path, settings: dict) -> None:
    """Raises `ValueError` if the folder holds an evaluation of something else."""
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in settings if before.get(name) != json.loads(json.dumps(settings[name]))]
        if changed:
            raise ValueError(
                f'"{file.parent}" holds an evaluation with another {", ".join(changed)}: delete it or choose another '
                "output folder."
            )


# The loop -------------------------------------------------------------------------------------------------------------


def evaluate_segmenter(
    segmenter,
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
) -> Evaluation:
    """
    Segments every photo of a data set and counts the pixels of each pair of a true and a predicted category.

    Args:
        segmenter: of [`load_segmenter`], its words set to `data.names` in their order.
        data: photos, masks and names.
        smoothing: pairs of neighbours and iterations, each counted by itself; (k, 0) does not smooth. Default: the one
            pair of the segmenter's image processor.
        batch_size: photos of one size that run together. It changes no number.
        state_dir: where the counts are kept; a second run with the same model, data and settings goes on there. With
            several processes it is needed, and must be on a disk that all of them see.
        on_error: "skip" leaves out photos that cannot be read, "fail" raises [`SampleError`] at the first.
        limit: only so many photos, the first.
        predictions_dir: takes a PNG of each photo's labels (of the first setting), named after the photo.
        overlays_dir, overlays: takes, of so many photos, a picture of the photo, the truth and the prediction.
        progress: whether to show a bar with the mean IoU so far (of this process and the first setting).

    Returns:
        The [`Evaluation`], of all processes, in each of them.

    Raises:
        `ValueError`: no photo, a setting out of range, or a `state_dir` of another evaluation.
    """
    if smoothing is None:
        own = segmenter.image_processor
        smoothing = [(own.smoothing_neighbors, own.smoothing_iterations)]
    smoothing = list(dict.fromkeys((1, 0) if n == 0 else (k, n) for k, n in smoothing))
    if not smoothing or any(k < 1 or n < 0 for k, n in smoothing):
        raise ValueError(f"smoothing={smoothing}: give pairs of at least 1 neighbour and 0 iterations.")
    if on_error not in ("skip", "fail"):
        raise ValueError(f'on_error="{on_error}": choose skip or fail.')
    state = PartialState()
    if state.num_processes > 1 and state_dir is None:
        raise ValueError("Several processes share their counts in a folder: give state_dir.")
    for folder in (predictions_dir, overlays_dir):
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"smoothing": smoothing, "names": data.names, "on_error": on_error, "limit": limit}
    settings |= {"model": fingerprint(segmenter) if state_dir else "", "photos": _size(data, limit)}
    settings |= {"segmenter": type(segmenter).__name__, "inference": inference_of(segmenter)}
    counted = _Counted(Path(state_dir) if state_dir else None, settings, smoothing, len(data.names))

    def count(batch: list["_Sample"]) -> None:
        outputs = segmenter(segmenter.preprocess([sample.image for sample in batch]))
        for sample, swept in zip(batch, smoothing_sweep(outputs, smoothing), strict=True):
            maps = [resized_argmax(patches, sample.truth.shape).cpu() for patches in swept]
            for setting, labels in zip(smoothing, maps, strict=True):
                counted.metrics[setting].add(prediction=labels, reference=sample.truth)
            counted.images.append(sample.index)
            if predictions_dir is not None:
                save_mask(maps[0], Path(predictions_dir) / f"{_file_name(sample.id)}.png", data.names)
            if overlays_dir is not None and sample.index < overlays:
                picture = _picture(sample, maps[0], data.names)
                picture.save(Path(overlays_dir) / f"{_file_name(sample.id)}.png")

    samples = _samples(data, counted, on_error, limit, state.process_index, state.num_processes)
    started = saved = time.monotonic()
    total = settings["photos"]
    bar = tqdm(
        total=None if total is None else len(range(state.process_index, total, state.num_processes)),
        unit="photo",
        mininterval=1,
        disable=not (progress and state.is_local_main_process),
    )
    with bar:
        for batch in _equal_sizes(samples, batch_size, bar.update):
            count(batch)
            if bar.n and not bar.disable:
                bar.set_postfix(mIoU=f"{100 * scores(counted.metrics[smoothing[0]].confusion_matrix)['mean_iou']:.1f}")
            if time.monotonic() - saved > SAVE_EVERY:
                counted.save()
                saved = time.monotonic()
    counted.save()
    matrices, images, skipped = counted.total()
    if not images:
        raise ValueError(f"No photo could be counted{': ' + skipped[0] if skipped else ''}.")
    return Evaluation(data.names, matrices, images, skipped, time.monotonic() - started, data.subsets)


@dataclass
class _Sample:
    index: int
    id: str
    image: np.ndarray
    truth: np.ndarray


def _size(data: SegmentationDataset, limit: int | None) -> int | None:
    """Photos of a data set; `None` where it is streamed and nobody knows."""
    try:
        count = len(data.samples)
    except TypeError:
        return limit
    return count if limit is None else min(count, limit)


def _samples(
    data: SegmentationDataset, counted: _Counted, on_error: str, limit: int | None, rank: int, world: int
) -> Iterator[_Sample | None]:
    """This process' photos that are still to be counted; `None` for each that is not."""
    for index, row in enumerate(data.samples):
        if limit is not None and index >= limit:
            return
        if index % world != rank:
            continue
        if index in counted.before:
            yield None
            continue
        try:
            image, truth = data.read(row)
        except SampleError as error:
            if on_error == "fail":
                counted.save()
                raise
            counted.skipped[index] = str(error)
            yield None
            continue
        yield _Sample(index, str(row["id"]), image, truth)


def _equal_sizes(
    samples: Iterator[_Sample | None], batch_size: int, tell: Callable[[int], Any]
) -> Iterator[list[_Sample]]:
    """Batches of photos of equal size, whatever order they come in; tells how many photos came to an end."""
    waiting: dict[tuple[int, ...], list[_Sample]] = {}
    for sample in samples:
        if sample is None:
            tell(1)
            continue
        group = waiting.setdefault(sample.image.shape, [])
        group.append(sample)
        if sum(map(len, waiting.values())) >= _BUFFERED:
            group = max(waiting.values(), key=len)
        elif len(group) < batch_size:
            continue
        yield waiting.pop(group[0].image.shape)
        tell(len(group))
    for group in waiting.values():
        yield group
        tell(len(group))


def _file_name(id: str) -> str:
    return id.replace("/", "_").replace("\\", "_")


def _picture(sample: _Sample, labels: torch.Tensor, names: list[str]) -> Image.Image:
    """The photo, the ground truth and the prediction in a row, the last two with their legends."""
    photo = Image.fromarray(sample.image)
    pictures = [photo, overlay(photo, sample.truth, names), overlay(photo, labels, names)]
    return side_by_side(pictures, ["photo", "ground truth", "prediction"])


# For a person ---------------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{100 * value:.1f}"


def setting_name(neighbors: int, iterations: int) -> str:
    return f"k={neighbors}, n={iterations}" if iterations else "none"


def markdown(results: list[dict[str, Any]]) -> str:
    """Two tables of [`Evaluation.results`]: the means of every smoothing setting, and each category at the first."""
    means = [name for name in results[0] if name not in ("smoothing_neighbors", "smoothing_iterations", "categories")]
    titles = [name.replace("_", " ").replace("iou", "IoU") for name in means]
    lines = [f"| smoothing | {' | '.join(titles)} |", "|---" * (len(means) + 1) + "|"]
    for result in results:
        setting = setting_name(result["smoothing_neighbors"], result["smoothing_iterations"])
        lines.append(f"| {setting} | {' | '.join(percent(result[name]) for name in means)} |")
    first = results[0]
    setting = setting_name(first["smoothing_neighbors"], first["smoothing_iterations"])
    lines += ["", f"| category (smoothing: {setting}) | IoU | accuracy |", "|---|---|---|"]
    for name, told in first["categories"].items():
        escaped = name.replace("|", "\\|")
        lines.append(f"| {escaped} | {percent(told['iou'])} | {percent(told['accuracy'])} |")
    return "\n".join(lines) + "\n"
