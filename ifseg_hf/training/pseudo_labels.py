"""Labels that a model makes of photos itself, for self-training (sections 4.2, A.2 and A.3 of the paper)."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
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
from ifseg_hf.data.segmentation import SampleError, SegmentationDataset
from ifseg_hf.modeling.modeling_ifseg import IFSegForSemanticSegmentation
from ifseg_hf.pretrained import resolve_model
from ifseg_hf.processing.image_processing_ifseg import IGNORE_INDEX, read_image, to_array
from ifseg_hf.processing.post_processing_ifseg import patch_scores, resize_scores
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.training.config import INCOMPLETE, PSEUDO_LABELS

GIVEN = "given"  # folder of masks beside the labels: 255 where a label was given, 0 where it is the model's guess


@dataclass
class PseudoLabelConfig:
    """How a model guesses labels.

    Args:
        smoothing_neighbors, smoothing_iterations: as in post-processing; 0 iterations do not smooth.
        min_confidence: from 0 to 1; a pixel whose best category has a lower probability gets no label.
        guessed: names of the categories to guess, such as the unseen ones; None for all.
    """

    smoothing_neighbors: int = 3
    smoothing_iterations: int = 25
    min_confidence: float = 0.0
    guessed: list[str] | None = None

    def __post_init__(self):
        if self.smoothing_neighbors < 1:
            raise ValueError(f"smoothing_neighbors={self.smoothing_neighbors}: must be at least 1.")
        if self.smoothing_iterations < 0:
            raise ValueError(f"smoothing_iterations={self.smoothing_iterations}: must be at least 0.")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence={self.min_confidence}: must be from 0 to less than 1.")


def confident_labels(
    probabilities: torch.Tensor, size: tuple[int, int], min_confidence: float = 0.0, candidates: Sequence[int] = ()
) -> torch.Tensor:
    """The likeliest category of each pixel.

    Args:
        probabilities: (categories, h, w), resized bilinearly to `size` (height, width).
        min_confidence: pixels of which no candidate is as likely become -100.
        candidates: the categories to choose from; by default all.

    Returns:
        int64 of shape `size`; of equally likely categories the first wins.
    """
    best = torch.full(size, -1.0, device=probabilities.device)
    labels = torch.full(size, IGNORE_INDEX, device=probabilities.device)
    for category in candidates or range(len(probabilities)):  # one at a time: there may be many, of many pixels
        resized = resize_scores(probabilities[category, None], size)[0]
        better = (resized > best) & (resized >= min_confidence)
        best[better], labels[better] = resized[better], category
    return labels


@torch.no_grad()
def predict_labels(
    model: IFSegForSemanticSegmentation,
    processor: IFSegProcessor,
    photo: np.ndarray,
    guess: PseudoLabelConfig,
    names: list[str],
) -> np.ndarray:
    """Labels of a photo uint8 (H, W, 3), indices into `names`, as int64 (H, W), by a model in evaluation mode.

    The model's words include those to guess, and no other is chosen. It gets the photo in crops if the processor has a
    sliding window, as that of a supervised model has.
    """
    inputs = processor(images=photo, return_tensors="pt").to(model.device)
    sliding = processor.image_processor.sliding_window is not None
    outputs = processor.sliding_window(model, **inputs) if sliding else model(**inputs)
    (scores,) = patch_scores(outputs, guess.smoothing_neighbors, guess.smoothing_iterations)
    probabilities = scores if guess.smoothing_iterations else scores.softmax(0)
    guessed = guess.guessed or names
    own = [model.config.label2id[name] for name in guessed]
    labels = confident_labels(probabilities, photo.shape[:2], guess.min_confidence, own).cpu().numpy()
    label_of = np.full(len(probabilities), IGNORE_INDEX)
    label_of[own] = [names.index(name) for name in guessed]
    return np.where(labels == IGNORE_INDEX, IGNORE_INDEX, label_of[labels.clip(0)])


def label_images(
    model: IFSegForSemanticSegmentation,
    processor: IFSegProcessor,
    data: SegmentationDataset,
    guess: PseudoLabelConfig,
    indices: Iterable[int],
    given: Callable[[dict, np.ndarray], np.ndarray],
    write: Callable[[dict, np.ndarray, np.ndarray], None],
) -> np.ndarray:
    """Labels of the samples `indices` of `data`: those given, and the model's guesses elsewhere.

    Args:
        given: from a sample and its labels, bool (H, W): which labels are to be kept.
        write: gets the sample, its new labels int64 (H, W) and what `given` returned.

    Returns:
        int64 (3,): how many pixels have a given label, a guess, none.
    """
    counts, training = np.zeros(3, np.int64), model.training
    model.eval()
    for index in indices:
        sample = data.samples[index]
        photo, labels = data.read(sample)
        kept = given(sample, labels)
        if not kept.all():
            labels = np.where(kept, labels, predict_labels(model, processor, photo, guess, data.names))
        write(sample, labels, kept)
        labelled = labels != IGNORE_INDEX
        counts += [(kept & labelled).sum(), (~kept & labelled).sum(), (~labelled).sum()]
    model.train(training)
    return counts


def save_labels(labels: np.ndarray, file: Path) -> None:
    """Writes int64 (H, W) as an 8-bit PNG, -100 as 255. The file is whole or not there."""
    incomplete = file.with_name(file.name + INCOMPLETE)
    Image.fromarray(np.where(labels == IGNORE_INDEX, NO_LABEL, labels).astype(np.uint8)).save(incomplete, format="png")
    incomplete.replace(file)


# Anew, during training ------------------------------------------------------------------------------------------------


def refresh_labels(
    model: IFSegForSemanticSegmentation,
    processor: IFSegProcessor,
    data: SegmentationDataset,
    folder: Path,
    output: Path,
    state: PartialState,
) -> None:
    """Writes `output/ID.png` for each sample of this process: labels that were given to it, and new guesses.

    Args:
        data: read from `folder`, which [`write_pseudo_labels`] made.
        state: which samples are this process's.

    The guesses are not smoothed: the model has seen photos by now.
    """
    told = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))[PSEUDO_LABELS]
    guessed = [name for name in told["guessed"] or data.names if name in data.names]
    guess = PseudoLabelConfig(smoothing_iterations=0, min_confidence=told["min_confidence"], guessed=guessed)

    def given(sample: dict, labels: np.ndarray) -> np.ndarray:
        file = folder / GIVEN / f"{sample['id']}.png"
        return np.asarray(Image.open(file)) > 0 if told["keep_labels"] else np.zeros(labels.shape, bool)

    def write(sample: dict, labels: np.ndarray, kept: np.ndarray) -> None:
        save_labels(labels, output / f"{sample['id']}.png")

    indices = range(state.process_index, len(data.samples), state.num_processes)
    label_images(model, processor, data, guess, indices, given, write)


# As a data set --------------------------------------------------------------------------------------------------------


class UnlabelledImages(SegmentationDataset):
    """Photos without masks: each has no label anywhere."""

    def read(self, sample) -> tuple[np.ndarray, np.ndarray]:
        try:
            photo = to_array(read_image(sample["image"]["path"]))
        except ValueError as error:
            raise SampleError(str(error)) from error
        return photo, np.full(photo.shape[:2], IGNORE_INDEX)


def load_images(folder: str | Path, names: list[str]) -> UnlabelledImages:
    """All images in a folder, as a data set of the categories `names`. Raises `ValueError` if there is none."""
    endings = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
    files = {file.stem: str(file) for file in sorted(Path(folder).glob("*")) if file.suffix.lower() in endings}
    if not files:
        raise ValueError(f'There is no photo in "{folder}".')
    column = datasets.Image(decode=False)
    features = datasets.Features(id=datasets.Value("string"), image=column, mask=column)
    columns = {"id": list(files), "image": list(files.values()), "mask": [None] * len(files)}
    samples = datasets.Dataset.from_dict(columns, features=features)
    return UnlabelledImages(samples, list(names), np.arange(len(names)), {})


def write_pseudo_labels(
    model: str,
    data: SegmentationDataset,
    output_dir: str | Path,
    guess: PseudoLabelConfig | None = None,
    keep_labels: bool = False,
    unseen: str | None = None,
    cpu: bool = False,
) -> Path:
    """Writes a data set of photos and labels: `images/`, `masks/`, `dataset.json`, and `given/` with `keep_labels`.

    Call it under `accelerate launch` to share the photos among several processes. A run that was stopped goes on when
    it is started again.

    Args:
        model: folder or Hub id. It is asked for the words it was tuned for if those to guess are among them, else for
            those to guess.
        data: what to label; of its own labels only those that `keep_labels` keeps are looked at.
        guess: see [`PseudoLabelConfig`]. With `unseen`, those are the categories to guess.
        keep_labels: keep the labels that there are, and guess where there is none.
        unseen: categories whose labels count as none; see [`find_labels`].

    Raises:
        `ValueError`: a wrong argument, a folder that holds something else, or a model that cannot be loaded.
        `SampleError`: a photo that cannot be used.
    """
    guess = guess or PseudoLabelConfig()
    if len(data.names) >= NO_LABEL:
        raise ValueError(f"{len(data.names)} categories do not fit into masks of 8 bits: {NO_LABEL - 1} do.")
    hidden = find_labels(data, unseen)
    if hidden:
        guess = replace(guess, guessed=[data.names[label] for label in hidden])
    told = {"model": str(model), "keep_labels": keep_labels, **asdict(guess)}
    content = {"categories": data.names, "ignore_index": NO_LABEL, PSEUDO_LABELS: told}
    output, state = Path(output_dir), PartialState(cpu=cpu)
    begun = output / f"dataset.json{INCOMPLETE}"
    if begin(output, begun, content, state):
        state.print(f"{output} is complete already.")
        return output
    segmenter, processor = load_segmenter(model, guess.guessed or data.names)
    segmenter.to(state.device)

    def given(sample: dict, labels: np.ndarray) -> np.ndarray:
        return (labels != IGNORE_INDEX) & ~np.isin(labels, hidden) & keep_labels

    def write(sample: dict, labels: np.ndarray, kept: np.ndarray) -> None:
        copy_photo(sample, output / "images")
        if keep_labels:
            save_labels(kept * 255, output / GIVEN / f"{sample['id']}.png")
        save_labels(labels, output / "masks" / f"{sample['id']}.png")  # the last: with it the sample is done

    done = {file.stem for file in (output / "masks").glob("*.png")}
    state.wait_for_everyone()  # all have seen the same masks: only then may the first of them write another
    todo = [index for index, name in enumerate(data.samples["id"]) if name not in done]
    mine = tqdm(todo[state.process_index :: state.num_processes], unit="photo", disable=not state.is_main_process)
    counts = label_images(segmenter, processor, data, guess, mine, given, write)
    shares = reduce(torch.from_numpy(counts).to(state.device), "sum").double()
    if state.is_main_process:
        begun.replace(output / "dataset.json")
    shares = (100 * shares / shares.sum().clamp(min=1)).tolist()
    given_share, guessed_share, none = (f"{share:.1f} %" for share in shares)
    state.print(f"{len(todo)} photos in {output}: labels given {given_share}, guessed {guessed_share}, none {none}.")
    return output


def begin(output: Path, begun: Path, content: dict, state: PartialState) -> bool:
    """Makes the folder, or finds it begun with the same settings. Returns whether it is complete."""
    for file in (output / "dataset.json", begun):
        if file.is_file():
            if json.loads(file.read_text(encoding="utf-8")) != content:
                raise ValueError(f'"{output}" holds labels of other settings or another model: choose another folder.')
            return file != begun
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f'The output folder "{output}" holds other files: choose another.')
    state.wait_for_everyone()  # before the first of them writes there
    try:
        for name in ("images", "masks", *([GIVEN] if content[PSEUDO_LABELS]["keep_labels"] else [])):
            (output / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'The output folder "{output}" cannot be made: {error.strerror}.') from None
    if state.is_main_process:
        begun.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    state.wait_for_everyone()
    return False


def load_segmenter(model: str, names: list[str]) -> tuple[IFSegForSemanticSegmentation, IFSegProcessor]:
    """A model in evaluation mode whose words include `names`, or are `names`; and its processor."""
    try:
        folder = resolve_model(model)
        processor = IFSegProcessor.from_pretrained(folder)
        segmenter = IFSegForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f'"{model}" can\'t be loaded: {" ".join(str(error).split())}'[:500]) from error
    config = segmenter.config
    if config.category_ids is not None and set(names) <= config.label2id.keys():
        return segmenter.eval(), processor
    append_unknown = config.prompt_ids is None or processor.ends_with_unknown(config.prompt_ids)
    segmenter.set_words(**processor.encode_categories(names, config.prompt, append_unknown))
    return segmenter.eval(), processor


def copy_photo(sample: dict, folder: Path) -> None:
    """Puts the photo's file there under the sample's id: a second name for it where the disk allows that."""
    image = sample["image"]
    file = folder / (sample["id"] + (Path(image["path"] or "").suffix or ".jpg"))
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
    "load_images",
    "predict_labels",
    "refresh_labels",
    "write_pseudo_labels",
]
