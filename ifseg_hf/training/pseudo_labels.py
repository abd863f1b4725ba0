"""Pseudo-labels: labels that a model predicts for training images (sections 4.2, A.2 and A.3 of the paper)."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from PIL import Image
from tqdm import tqdm

from ifseg_hf.data.crops import NO_LABEL, find_labels
from ifseg_hf.data.image_files import SampleError, check_on_error, list_images
from ifseg_hf.data.segmentation import SegmentationDataset
from ifseg_hf.data.unnamed_masks import UnnamedMasks
from ifseg_hf.evaluation.segmenter import load_segmenter
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.processing.background_ifseg import BACKGROUND
from ifseg_hf.processing.image_processing_ifseg import IGNORE_INDEX
from ifseg_hf.processing.image_reading_ifseg import read_image, to_array
from ifseg_hf.processing.post_processing_ifseg import resize_scores
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.processing.segmenter_ifseg import IFSegSegmenter
from ifseg_hf.processing.text_ifseg import normalize_text
from ifseg_hf.training.config import INCOMPLETE, OF_MASKS, PSEUDO_LABELS

GIVEN = "given"  # folder of masks beside the labels: 255 where a label was given, 0 where the model predicted it


@dataclass
class PseudoLabelConfig:
    """Settings of the prediction of labels.

    Args:
        smoothing_neighbors, smoothing_iterations: of the model's predictions; 0 iterations do not smooth. `None`: the
            setting that the model needs, as its image processor says.
        min_confidence: from 0 to 1; a pixel whose best category to predict has a lower probability, among all words of
            the prompt, gets no label.
        predicted: names of the categories to predict, such as the unseen categories; `None` for all.
    """

    smoothing_neighbors: int | None = None
    smoothing_iterations: int | None = None
    min_confidence: float = 0.0
    predicted: list[str] | None = None

    def __post_init__(self):
        if self.smoothing_neighbors is not None and self.smoothing_neighbors < 1:
            raise ValueError(f"smoothing_neighbors={self.smoothing_neighbors}: must be at least 1.")
        if self.smoothing_iterations is not None and self.smoothing_iterations < 0:
            raise ValueError(f"smoothing_iterations={self.smoothing_iterations}: must be at least 0.")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence={self.min_confidence}: must be from 0 to less than 1.")


def confident_labels(
    probabilities: torch.Tensor, size: tuple[int, int], min_confidence: float = 0.0, candidates: Sequence[int] = ()
) -> torch.Tensor:
    """Returns the most probable category of each pixel.

    Args:
        probabilities: (categories, h, w), resized bilinearly to `size` (height, width).
        min_confidence: pixels where no candidate is as probable get -100.
        candidates: the categories to choose from; by default all.

    Returns:
        int64 of shape `size`; of equally probable categories the first wins.
    """
    best = torch.full(size, -1.0, device=probabilities.device)
    labels = torch.full(size, IGNORE_INDEX, device=probabilities.device)
    for category in candidates or range(len(probabilities)):  # one at a time, to save memory
        resized = resize_scores(probabilities[category, None], size)[0]
        better = (resized > best) & (resized >= min_confidence)
        best[better], labels[better] = resized[better], category
    return labels


def mask_labels(
    probabilities: torch.Tensor, masks: np.ndarray, min_confidence: float = 0.0, candidates: Sequence[int] = ()
) -> torch.Tensor:
    """Returns one label for all pixels of a mask: the category of the highest mean probability in it (Appendix A.2).

    Args:
        probabilities: (categories, h, w), resized bilinearly to the size of `masks`.
        masks: the number of each pixel's mask, int64 (H, W); -100 for pixels that belong to none, and get -100.
        min_confidence: masks where no candidate's mean is as high get -100.
        candidates: the categories to choose from; by default all.

    Returns:
        int64 (H, W); of equally probable categories the first wins.
    """
    numbers, positions = np.unique(masks, return_inverse=True)
    mask_of = torch.from_numpy(positions.reshape(-1)).to(probabilities.device)
    candidates = list(candidates or range(len(probabilities)))
    sums = []
    for category in candidates:  # one at a time, to save memory
        resized = resize_scores(probabilities[category, None], masks.shape)[0].flatten()
        sums.append(mask_of.bincount(weights=resized.double(), minlength=len(numbers)))
    highest, best = (torch.stack(sums) / mask_of.bincount(minlength=len(numbers))).max(0)
    labels = torch.tensor(candidates, device=best.device)[best]
    labels[highest < min_confidence] = IGNORE_INDEX
    labels[torch.from_numpy(numbers == IGNORE_INDEX)] = IGNORE_INDEX
    return labels[mask_of].view(masks.shape)


def predict_labels(
    segmenter: IFSegSegmenter,
    image: np.ndarray,
    config: PseudoLabelConfig,
    names: list[str],
    masks: np.ndarray | None = None,
) -> np.ndarray:
    """Returns predicted labels of an image uint8 (H, W, 3): indices into `names`, int64 (H, W).

    Only the categories to predict are chosen, which must be among the segmenter's words. With `masks`, each mask gets
    one label; see [`mask_labels`].
    """
    outputs = segmenter(segmenter.preprocess([image]))
    neighbors, iterations = segmenter.image_processor.smoothing(config.smoothing_neighbors, config.smoothing_iterations)
    (scores,) = segmenter.patch_scores(outputs, neighbors, iterations)
    probabilities = scores if iterations else scores.softmax(0)
    predicted = config.predicted or names
    own = [segmenter.model.config.label2id[name] for name in predicted]
    if masks is None:
        labels = confident_labels(probabilities, image.shape[:2], config.min_confidence, own).cpu().numpy()
    else:
        labels = mask_labels(probabilities, masks, config.min_confidence, own).cpu().numpy()
    label_of = np.full(len(probabilities), IGNORE_INDEX)
    label_of[own] = [names.index(name) for name in predicted]
    return np.where(labels == IGNORE_INDEX, IGNORE_INDEX, label_of[labels.clip(0)])


def label_images(
    segmenter: IFSegSegmenter,
    data: SegmentationDataset,
    config: PseudoLabelConfig,
    indices: Iterable[int],
    given: Callable[[dict, np.ndarray], np.ndarray],
    write: Callable[[dict, np.ndarray, np.ndarray], None],
    skip: Callable[[SampleError], None] | None = None,
) -> np.ndarray:
    """Labels the samples `indices` of `data`: given labels are kept, the model predicts the others.

    Args:
        given: function of a sample and its labels; returns bool (H, W), true for labels that are kept.
        write: function of a sample, its new labels int64 (H, W) and the result of `given`.
        skip: function of the error of an image that cannot be used, which is then left out. Default: it is raised.

    Returns:
        int64 (3,): numbers of pixels with a given label, a predicted label, and no label.
    """
    counts = np.zeros(3, np.int64)
    for index in indices:
        sample = data.samples[index]
        try:
            image, labels = data.read(sample)
        except SampleError as error:
            if skip is None:
                raise
            skip(error)
            continue
        kept = given(sample, labels)
        if not kept.all():
            masks = labels if isinstance(data, UnnamedMasks) else None
            labels = np.where(kept, labels, predict_labels(segmenter, image, config, data.names, masks))
        write(sample, labels, kept)
        labelled = labels != IGNORE_INDEX
        counts += [(kept & labelled).sum(), (~kept & labelled).sum(), (~labelled).sum()]
    return counts


def save_labels(labels: np.ndarray, file: Path) -> None:
    """Writes labels int64 (H, W) as an 8-bit PNG, -100 as 255. The file is complete or does not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)  # the name of an image in a sub-folder has that folder
    incomplete = file.with_name(file.name + INCOMPLETE)
    Image.fromarray(np.where(labels == IGNORE_INDEX, NO_LABEL, labels).astype(np.uint8)).save(incomplete, format="png")
    incomplete.replace(file)


# During training ------------------------------------------------------------------------------------------------------


def label_settings(folder: Path, names: list[str]) -> tuple[PseudoLabelConfig, bool]:
    """The settings for new predictions in a folder of [`write_pseudo_labels`], and whether it has given labels.

    `names` are the categories that are trained. Predictions are not smoothed, because the model is trained on images.
    """
    settings = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))[PSEUDO_LABELS]
    predicted = settings["predicted"] if "predicted" in settings else settings["guessed"]  # the key in version 0.1.0
    predicted = [name for name in predicted or names if name in names]
    config = PseudoLabelConfig(smoothing_iterations=0, min_confidence=settings["min_confidence"], predicted=predicted)
    return config, settings["keep_labels"]


def given_pixels(folder: Path, sample: Mapping, shape: tuple[int, ...], keep_labels: bool) -> np.ndarray:
    """Which pixels of a sample have a given label, bool (H, W) of `shape`."""
    if not keep_labels:
        return np.zeros(shape, bool)
    with Image.open(folder / GIVEN / f"{sample['id']}.png") as image:
        return np.asarray(image) > 0


def refresh_labels(
    model: IFSegForSemanticSegmentation,
    processor: IFSegProcessor,
    data: SegmentationDataset,
    folder: Path,
    output: Path,
    state: PartialState,
    on_error: str = "fail",
) -> None:
    """Writes `output/ID.png` for each sample of this process: its given labels, and new predictions elsewhere.

    Args:
        data: read from `folder`, which [`write_pseudo_labels`] made.
        state: rank and number of the processes, among which the samples are divided.
        on_error: "skip" leaves out images that cannot be used, which [`CropDataset`] names; "fail" raises
            [`SampleError`].
    """
    config, keep_labels = label_settings(folder, data.names)

    def given(sample: dict, labels: np.ndarray) -> np.ndarray:
        return given_pixels(folder, sample, labels.shape, keep_labels)

    def write(sample: dict, labels: np.ndarray, kept: np.ndarray) -> None:
        save_labels(labels, output / f"{sample['id']}.png")

    training = model.training
    indices = range(state.process_index, len(data.samples), state.num_processes)
    skip = (lambda error: None) if on_error == "skip" else None
    label_images(IFSegSegmenter(model, processor), data, config, indices, given, write, skip)
    model.train(training)


# As a dataset -------------------------------------------------------------------------------------------------------


class UnlabelledImages(SegmentationDataset):
    """Images without masks: no pixel has a label."""

    def read(self, sample) -> tuple[np.ndarray, np.ndarray]:
        try:
            image = to_array(read_image(sample["image"]["path"]))
        except ValueError as error:
            raise SampleError(str(error)) from error
        return image, np.full(image.shape[:2], IGNORE_INDEX)


def load_images(folder: str | Path, names: list[str]) -> UnlabelledImages:
    """Returns the images in a folder and its sub-folders as a dataset of the categories `names`.

    Raises `ValueError` if there is no image, or if two of them have one name; see [`list_images`].
    """
    files = list_images(folder)
    if not files:
        raise ValueError(f'There is no image in "{folder}".')
    column = datasets.Image(decode=False)
    features = datasets.Features(id=datasets.Value("string"), image=column, mask=column)
    columns = {"id": list(files), "image": list(files.values()), "mask": [None] * len(files)}
    samples = datasets.Dataset.from_dict(columns, features=features)
    return UnlabelledImages(samples, list(names), np.arange(len(names)), {})


def write_pseudo_labels(
    model: str,
    data: SegmentationDataset,
    output_dir: str | Path,
    config: PseudoLabelConfig | None = None,
    keep_labels: bool = False,
    unseen: str | None = None,
    cpu: bool = False,
    trust_remote_code: bool = False,
    untuned: bool = False,
    on_error: str = "fail",
    background: str | list[str] | None = None,
) -> Path:
    """Writes a dataset of images and labels: `images/`, `masks/`, `dataset.json`, and `given/` with `keep_labels`.

    Call it under `accelerate launch` to share the images among several processes. A stopped run resumes when it is
    started again. Each mask of [`UnnamedMasks`] gets one label; see [`mask_labels`].

    Args:
        model: folder or Hub id. It is asked all words that it was tuned on if they include the categories to predict,
            otherwise all categories of `data`: probabilities, which `min_confidence` limits, are over all of these.
        data: images to label, and labels that are kept with `keep_labels`.
        config: see [`PseudoLabelConfig`]; `unseen` replaces its `predicted`.
        keep_labels: keep the labels of `data`, and predict labels for the other pixels.
        unseen: categories to predict, whose given labels are not kept; see [`find_labels`].
        untuned: also label with a model that was never tuned, which is refused otherwise.
        on_error: "skip" leaves out images that cannot be used, and names each; "fail" raises [`SampleError`].
        background: words that are merged into a last category, "background"; see [`IFSegProcessor`]. Default: the
            model's, if it is asked its own words; otherwise "default" for a single category, none for several.

    Raises:
        `ValueError`: an argument is wrong, the folder has other files, or the model cannot be loaded.
        `SampleError`: an image cannot be used.
    """
    config = config or PseudoLabelConfig()
    check_arguments(data, on_error)
    if hidden := find_labels(data, unseen):
        config = replace(config, predicted=[data.names[label] for label in hidden])
    output, state = Path(output_dir), PartialState(cpu=cpu)
    segmenter = load_segmenter(model, device=state.device, trust_remote_code=trust_remote_code, untuned=untuned)
    set_label_words(segmenter, config.predicted or data.names, data.names, background)
    data, config = with_background(segmenter, data, config)
    settings = {"model": str(model), "keep_labels": keep_labels, **asdict(config)}
    if isinstance(data, UnnamedMasks):
        settings[OF_MASKS] = True
    content = {"categories": data.names, "ignore_index": NO_LABEL, PSEUDO_LABELS: settings}
    begun = output / f"dataset.json{INCOMPLETE}"
    if begin(output, begun, content, state):
        state.print(f"{output} is complete already.")
        return output

    def given(sample: dict, labels: np.ndarray) -> np.ndarray:
        return (labels != IGNORE_INDEX) & ~np.isin(labels, hidden) & keep_labels

    def write(sample: dict, labels: np.ndarray, kept: np.ndarray) -> None:
        copy_image(sample, output / "images")
        if keep_labels:
            save_labels(kept * 255, output / GIVEN / f"{sample['id']}.png")
        save_labels(labels, output / "masks" / f"{sample['id']}.png")  # the last file: it marks the sample as done

    done = set(list_images(output / "masks"))
    state.wait_for_everyone()  # no process writes a mask before every process has listed them
    todo = [index for index, name in enumerate(data.samples["id"]) if name not in done]
    mine = tqdm(todo[state.process_index :: state.num_processes], unit="image", disable=not state.is_main_process)
    skipped: list[SampleError] = []

    def skip(error: SampleError) -> None:
        skipped.append(error)
        tqdm.write(f"Skipped: {error}", file=sys.stderr)

    counts = label_images(segmenter, data, config, mine, given, write, skip if on_error == "skip" else None)
    sums = reduce(torch.from_numpy(np.append(counts, len(skipped))).to(state.device), "sum")
    shares, left_out = sums[:3].double(), int(sums[3])
    if state.is_main_process:
        begun.replace(output / "dataset.json")
    given_share, predicted, none = (f"{100 * x:.1f} %" for x in (shares / shares.sum().clamp(min=1)).tolist())
    written = f"{len(todo) - left_out} images in {output}" + (f", {left_out} were skipped" if left_out else "")
    state.print(f"{written}: labels given {given_share}, predicted {predicted}, none {none}.")
    return output


def set_label_words(
    segmenter: IFSegSegmenter, predicted: list[str], names: list[str], background: str | list[str] | None
) -> None:
    """Asks the model all categories `names`, unless its own words have those to predict and no background is given."""
    config = segmenter.model.config
    if background is None and config.category_ids is not None and set(predicted) <= config.label2id.keys():
        return
    segmenter.set_words(names, background="default" if background is None and len(names) == 1 else background)


def with_background(
    segmenter: IFSegSegmenter, data: SegmentationDataset, config: PseudoLabelConfig
) -> tuple[SegmentationDataset, PseudoLabelConfig]:
    """Adds the segmenter's label "background" to the categories, and sets the smoothing that it needs."""
    neighbors, iterations = segmenter.image_processor.smoothing(config.smoothing_neighbors, config.smoothing_iterations)
    config = replace(config, smoothing_neighbors=neighbors, smoothing_iterations=iterations)
    if not segmenter.background or BACKGROUND in map(normalize_text, data.names):
        return data, config
    predicted = config.predicted and [*config.predicted, BACKGROUND]
    return replace(data, names=[*data.names, BACKGROUND]), replace(config, predicted=predicted)


def check_arguments(data: SegmentationDataset, on_error: str) -> None:
    """Checks arguments of [`write_pseudo_labels`]. Raises `ValueError`."""
    check_on_error(on_error)
    if len(data.names) >= NO_LABEL:
        raise ValueError(f"{len(data.names)} categories do not fit into masks of 8 bits: {NO_LABEL - 1} do.")


def begin(output: Path, begun: Path, content: dict, state: PartialState) -> bool:
    """Creates the folder, or checks that it has the same settings. Returns whether its dataset is complete."""
    for file in (output / "dataset.json", begun):
        if file.is_file():
            if json.loads(file.read_text(encoding="utf-8")) != content:
                raise ValueError(f'"{output}" holds labels of other settings or another model: choose another folder.')
            return file != begun
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f'The output folder "{output}" holds other files: choose another.')
    state.wait_for_everyone()  # before any process writes there
    try:
        for name in ("images", "masks", *([GIVEN] if content[PSEUDO_LABELS]["keep_labels"] else [])):
            (output / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'The output folder "{output}" cannot be created: {error.strerror}.') from None
    if state.is_main_process:
        begun.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    state.wait_for_everyone()
    return False


def copy_image(sample: dict, folder: Path) -> None:
    """Copies the image's file to a folder, named after the sample's id; as a hard link where the disk allows it."""
    image = sample["image"]
    file = folder / (sample["id"] + (Path(image["path"] or "").suffix or ".jpg"))
    file.parent.mkdir(parents=True, exist_ok=True)
    if image.get("bytes") is not None:
        file.write_bytes(image["bytes"])
    elif not file.exists():
        try:
            os.link(image["path"], file)
        except OSError:
            shutil.copyfile(image["path"], file)


__all__ = [
    "PseudoLabelConfig",
    "UnlabelledImages",
    "confident_labels",
    "given_pixels",
    "label_settings",
    "load_images",
    "mask_labels",
    "predict_labels",
    "refresh_labels",
    "write_pseudo_labels",
]
