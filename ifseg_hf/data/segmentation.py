"""Photos with masks: COCO-Stuff and ADE20K as they are distributed, a folder of one's own, or a data set of the Hub.

Every reader returns a [`SegmentationDataset`]: a `datasets` data set of files that are opened only when they are read, and
a table from the numbers in its masks to labels. COCO-Stuff has 171 categories, of which 15 are unseen in zero-shot
transfer (appendix A.3), or 27 coarse ones (Table 15); ADE20K has 150.
"""

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image, UnidentifiedImageError

from ifseg_hf.data.vocabularies import read_categories
from ifseg_hf.processing.image_processing_ifseg import IGNORE_INDEX, to_array

UNKNOWN = -1  # in a table of labels: a number that must not occur in a mask

_PHOTOS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_MASKS = (".png", ".bmp", ".tif", ".tiff")
_FILE = datasets.Image(decode=False)
_MASK_COLUMNS = ("mask", "label", "annotation", "segment", "target", "ground_truth")

# Raw numbers of things that COCO named and never labelled: street sign, hat, shoe, eye glasses, plate, mirror, window,
# desk, door, blender, hair brush.
_COCO_ABSENT = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
# Of the 171 names, those that Table 15 leaves out, because they are the rest of their coarse category, or spells in
# another way.
_COCO_COARSE = {
    "person": ["person"],
    "sports": ["skis"],
    "water": ["water"],
    "ground": ["ground"],
    "solid": ["solid"],
    "sky": ["sky"],
    "plant": ["plant"],
    "structural": ["structural"],
    "building": ["building", "skyscraper"],
    "food (stuff)": ["food"],
    "textile": ["textile"],
    "furniture (stuff)": ["furniture"],
    "window": ["other window"],
    "floor": ["other floor"],
    "ceiling": ["ceiling", "ceiling tile"],
    "wall": ["other wall"],
}
# Table 15 has door, desk and mirror twice. Labelled are only those of stuff: the things are among the absent.
_COCO_STUFF_ONLY = ("door", "desk", "mirror")

BENCHMARKS = ("coco-stuff", "coco-stuff-unseen", "coco-stuff-seen", "coco-stuff-coarse", "ade20k")
"""Data sets that [`load_segmentation_dataset`] knows by name; they need the folder that the data was unpacked to."""


class SampleError(ValueError):
    """A photo or a mask that cannot be used. The message is one line for a person and names the file."""


@dataclass
class SegmentationDataset:
    """
    Photos with masks, and what the numbers in the masks mean.

    Attributes:
        samples: data set with the columns **id** (`str`, unique), **image** and **mask** (`datasets.Image(decode=
            False)`: a path or the bytes of a file). Nothing in it was opened yet.
        names: the categories in order of their labels.
        labels (`np.ndarray`, int64): the label of each number in a mask, which is an index into `names`, -100 for
            pixels that count nowhere, or -1 for a number that must not occur, as is every number beyond the table.
        subsets: lists of labels by name, such as seen and unseen categories; empty where there are none.
    """

    samples: datasets.Dataset | datasets.IterableDataset
    names: list[str]
    labels: np.ndarray
    subsets: dict[str, list[int]]

    def read(self, sample: Mapping) -> tuple[np.ndarray, np.ndarray]:
        """
        Opens one of `samples`.

        Returns:
            Two `np.ndarray`: the photo `(H, W, 3)`, uint8 RGB, turned upright by its EXIF orientation; and its labels
            `(H, W)`, int64, indices into `names` or -100.

        Raises:
            [`SampleError`]: a file is missing or damaged, the mask has colours instead of numbers, another size than
                the photo, or a number that stands for no category.
        """
        photo = _open(sample, "image", "photo")
        try:
            image = to_array(photo)
        except ValueError as error:
            raise SampleError(f"Can't use {_name(sample, 'image', 'photo')}: {error}") from error
        mask, name = _open(sample, "mask", "mask"), _name(sample, "mask", "mask")
        values = np.asarray(mask)
        if values.ndim != 2 or values.dtype.kind not in "biu":
            raise SampleError(
                f"{name} is a picture of mode {mask.mode}, but a mask has one whole number a pixel (a grey or palette "
                "PNG): convert its colours to numbers."
            )
        if values.shape != image.shape[:2]:
            raise SampleError(
                f"{name} is {values.shape[1]} x {values.shape[0]} pixels, and its photo "
                f"{_name(sample, 'image', 'photo')} {image.shape[1]} x {image.shape[0]}."
            )
        values = values.astype(np.int64)
        inside = (values >= 0) & (values < len(self.labels))
        labels = np.where(inside, self.labels[np.where(inside, values, 0)], UNKNOWN)
        if (labels == UNKNOWN).any():
            unknown, counts = np.unique(values[labels == UNKNOWN], return_counts=True)
            told = [f"{value} ({count} pixels)" for value, count in zip(unknown[:5], counts[:5], strict=True)]
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise SampleError(
                f"{name} holds numbers that stand for no category: {', '.join(told)}{more}. "
                "If one means that pixels have no label, give it as ignore_index."
            )
        return image, labels

    def select(self, categories: Sequence[str] | Mapping[str, Sequence[str]]) -> "SegmentationDataset":
        """
        The same photos with other categories; pixels of names that are not mentioned are ignored.

        Args:
            categories: a list, to keep only these names, in this order; or `{category: [name, ...]}`, to call the
                pixels of all names in the list by one word: another wording, several names as one, a coarse view.

        Returns:
            [`SegmentationDataset`], whose subsets are the old ones if each category lies in one of them, and there still
            are several.

        Raises:
            `ValueError`: for a name that the data does not have, and for one in two lists.
        """
        categories = read_categories(categories)
        groups = categories if isinstance(categories, dict) else {name: [name] for name in categories}
        category_of: dict[str, str] = {}
        for category, members in groups.items():
            for name in members:
                if name not in self.names:
                    close = difflib.get_close_matches(name, self.names, n=3)
                    hint = f" Close to it: {', '.join(close)}." if close else ""
                    raise ValueError(f'The data has no category "{name}".{hint}')
                if name in category_of:
                    raise ValueError(f'"{name}" counts as "{category_of[name]}" and as "{category}": choose one.')
                category_of[name] = category
        names = list(groups)
        moved = np.array(
            [names.index(category_of[name]) if name in category_of else IGNORE_INDEX for name in self.names]
        )
        labels = np.where(self.labels >= 0, moved[np.maximum(self.labels, 0)], self.labels)
        subsets = {}
        for subset, members in self.subsets.items():
            theirs = {self.names[label] for label in members}
            subsets[subset] = [label for label, group in enumerate(groups.values()) if theirs.issuperset(group)]
        if not all(subsets.values()) or sum(map(len, subsets.values())) < len(names):
            subsets = {}
        return SegmentationDataset(self.samples, names, labels, subsets)


def load_segmentation_dataset(
    source: str,
    data_dir: str | os.PathLike | None = None,
    split: str | None = None,
    categories: Sequence[str] | None = None,
    ignore_index: int | None = None,
    streaming: bool = False,
) -> SegmentationDataset:
    """
    Photos with masks by the name of a benchmark, from a folder, or from the Hub. No photo and no mask is opened.

    Args:
        source: one of

            - one of [`BENCHMARKS`], unpacked in `data_dir`: COCO-Stuff (`val2017/*.jpg` and
              `stuffthingmaps_trainval2017/val2017/*.png`), all 171 categories or a view of them, or ADE20K's
              SceneParsing (`images/validation/*.jpg`, `annotations/validation/*.png`);
            - a folder with `images/` and `masks/`, or `<split>/images/` and `<split>/masks/`, in which a mask has the
              name of its photo, and a `dataset.json` with `"categories"`, the names in order of the masks' numbers,
              and, if one number means "no label", `"ignore_index"`;
            - a data set of the Hub, `owner/name`, or a folder that `datasets.load_dataset` can read, with a column of
              photos and one of masks. Its names come from `id2label.json` beside the data, or from a column that lists
              the categories of each photo.
        data_dir: the folder of a benchmark.
        split: by default the one for validation, or the only one.
        categories: the names, where the data does not tell them: those of 0, 1, 2, ..., without `ignore_index`.
        ignore_index: the number in masks that means "no label", where the data does not tell it.
        streaming: read a data set of the Hub as it comes, without a download of all of it.

    Raises:
        `ValueError`: something is missing or cannot be told. The message says what to do.
    """
    if source in BENCHMARKS:
        if data_dir is None:
            raise ValueError(f"{source} needs the folder that it was unpacked to: give data_dir.")
        if categories is not None or ignore_index is not None:
            raise ValueError(f"{source} has its own categories and ignored number: leave these settings out.")
        return _load_ade20k(Path(data_dir), split) if source == "ade20k" else _load_coco(Path(data_dir), split, source)
    if data_dir is not None:
        raise ValueError(f'data_dir goes with {", ".join(BENCHMARKS)}; "{source}" is found by itself.')
    folder = Path(source)
    described = (folder / "dataset.json").exists() or (folder / "images").is_dir() or split_folders(folder)
    if folder.is_dir() and described:
        return _load_folder(folder, split, categories, ignore_index)
    close = difflib.get_close_matches(source, BENCHMARKS, n=1, cutoff=0.8)
    if not folder.is_dir() and (close or source.count("/") != 1):
        raise ValueError(
            f'"{source}" is no folder, no data set of the Hub (owner/name), and none of {", ".join(BENCHMARKS)}'
            f"{f': {close[0]}?' if close else '.'}"
        )
    return _load_hub(source, split, categories, ignore_index, streaming)


def _load_coco(folder: Path, split: str | None, view: str) -> SegmentationDataset:
    """COCO-Stuff. Its masks hold 0 ... 181, of which 11 never occur, and 255 for "no label"."""
    part = _choose_split(split, {"val2017": ("val", "validation"), "train2017": ("train", "training")}, "val2017")
    photos = _first_folder("photos of COCO", folder / part, folder / "images" / part)
    maps = ("stuffthingmaps_trainval2017", "stuffthingmaps")
    masks = _first_folder("masks of COCO-Stuff", *(folder / name / part for name in maps))
    labels = np.full(256, UNKNOWN)
    labels[[value for value in range(182) if value not in _COCO_ABSENT]] = np.arange(171)
    labels[255] = IGNORE_INDEX
    names, unseen = list(read_categories("coco-stuff")), list(read_categories("coco-stuff-unseen"))
    seen = [name for name in names if name not in unseen]
    subsets = {"seen": [names.index(name) for name in seen], "unseen": [names.index(name) for name in unseen]}
    data = SegmentationDataset(_paired_samples(photos, masks), names, labels, subsets)
    if view == "coco-stuff-coarse":
        return data.select(_coarse_categories(names))
    views = {"coco-stuff": names, "coco-stuff-unseen": unseen, "coco-stuff-seen": seen}
    return data.select(views[view])


def _coarse_categories(names: Sequence[str]) -> dict[str, list[str]]:
    """Which of the 171 `names` belong to each of the 27 coarse categories: Table 15, and what it takes for granted."""
    coarse = {}
    for category, fine in read_categories("coco-stuff-coarse").items():  # type: ignore[union-attr]
        dropped = _COCO_STUFF_ONLY if category == "furniture (things)" else ()
        fine = [name for name in fine if name in names and name not in dropped]
        coarse[category] = fine + _COCO_COARSE.get(category, [])
    return coarse


def _load_ade20k(folder: Path, split: str | None) -> SegmentationDataset:
    """ADE20K's SceneParsing. Its masks hold 1 ... 150, and 0 for "no label"."""
    part = _choose_split(split, {"validation": ("val",), "training": ("train",)}, "validation")
    roots = (folder, folder / "ADEChallengeData2016")
    photos = _first_folder("photos of ADE20K", *(root / "images" / part for root in roots))
    masks = _first_folder("masks of ADE20K", *(root / "annotations" / part for root in roots))
    names = list(read_categories("ade20k"))
    return SegmentationDataset(_paired_samples(photos, masks), names, _label_table(range(1, 151), 0), {})


def _load_folder(
    folder: Path, split: str | None, categories: Sequence[str] | None, ignore_index: int | None
) -> SegmentationDataset:
    """Photos and masks in two folders, perhaps one pair of them a split."""
    file = folder / "dataset.json"
    if file.exists():
        try:
            told = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from None
        if not isinstance(told, dict) or not isinstance(told.get("ignore_index"), (int, type(None))):
            raise ValueError(
                f'{file} should hold {{"categories": [names], "ignore_index": a number, if there is one}}.'
            )
        categories = _only_one(categories, told.get("categories"), "categories", file)
        ignore_index = _only_one(ignore_index, told.get("ignore_index"), "ignore_index", file)
    if not isinstance(categories, Sequence):
        raise ValueError(f'{file} has no list "categories": write one, or give the names of the masks\' numbers.')
    names = list(read_categories(categories))
    part = folder
    if not (folder / "images").is_dir():
        splits = split_folders(folder)
        split = split or next((name for name in ("val", "validation", "test") if name in splits), None)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            problem = f'There is no split "{split}" in {folder}' if split else f"Which split of {folder}"
            raise ValueError(f"{problem}: choose from {', '.join(splits) or 'none, as it has no images/'}.")
        part = folder / split
    elif split is not None:
        raise ValueError(f'{folder} has no splits: leave out "{split}".')
    values = [value for value in range(len(names) + 1) if value != ignore_index]
    labels = _label_table(values[: len(names)], ignore_index)
    return SegmentationDataset(_paired_samples(part / "images", part / "masks"), names, labels, {})


def _load_hub(
    source: str, split: str | None, categories: Sequence[str] | None, ignore_index: int | None, streaming: bool
) -> SegmentationDataset:
    """A data set that `datasets.load_dataset` knows how to read."""
    try:
        if split is None:
            splits = datasets.get_dataset_split_names(source)
            split = next((name for name in ("validation", "val", "test") if name in splits), None)
            if split is None and len(splits) == 1:
                split = splits[0]
            if split is None:
                raise ValueError(f"which split? Choose from {', '.join(splits)}.")
        samples = datasets.load_dataset(source, split=split, streaming=streaming)
    except Exception as error:  # datasets, huggingface_hub, its HTTP library and the readers each have their own
        where = "" if Path(source).is_dir() else " is no folder here and"
        reason = " ".join(str(error).split())
        raise ValueError(f'The data set "{source}"{where} can\'t be loaded: {reason}') from error
    image, mask = _image_columns(source, samples.features or {})
    numbers = _hub_categories(source, samples.features, categories, ignore_index)
    samples = samples.cast_column(image, _FILE).cast_column(mask, _FILE).select_columns([image, mask])
    samples = samples.rename_columns({old: new for old, new in ((image, "image"), (mask, "mask")) if old != new})
    if isinstance(samples, datasets.IterableDataset):
        features = datasets.Features(id=datasets.Value("string"), image=_FILE, mask=_FILE)
        samples = samples.map(lambda row, number: {"id": f"{number:06d}"}, with_indices=True, features=features)
    else:
        samples = samples.add_column("id", [f"{number:06d}" for number in range(len(samples))])
    samples = samples.select_columns(["id", "image", "mask"])
    return SegmentationDataset(samples, list(numbers.values()), _label_table(numbers, ignore_index), {})


def _image_columns(source: str, features: Mapping) -> tuple[str, str]:
    """The columns of photos and of masks."""
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    masks = [name for name in columns if any(word in name.lower() for word in _MASK_COLUMNS)]
    photos = [name for name in columns if name not in masks]
    photos = [name for name in photos if name in ("image", "pixel_values")] or photos
    if len(photos) != 1 or len(masks) != 1:
        raise ValueError(
            f'Which columns of "{source}" are the photo and its mask? Those of images are: '
            f'{", ".join(columns) or "none"}. Name them "image" and "mask".'
        )
    return photos[0], masks[0]


def _hub_categories(
    source: str, features: Mapping, categories: Sequence[str] | None, ignore_index: int | None
) -> dict[int, str]:
    """The names of the numbers in a data set's masks."""
    file: str | Path = Path(source) / "id2label.json"
    if not Path(source).is_dir():
        try:
            file = hf_hub_download(source, "id2label.json", repo_type="dataset")
        except EntryNotFoundError:
            file = ""
    lists = [getattr(feature, "feature", None) for feature in features.values()]
    lists = [feature for feature in lists if isinstance(feature, datasets.ClassLabel)]
    numbers: dict[int, str] = {}
    if file and Path(file).is_file():
        try:
            told = json.loads(Path(file).read_text(encoding="utf-8-sig"))
            numbers = {int(number): name for number, name in told.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            raise ValueError(f'id2label.json of "{source}" should hold {{"number": "name", ...}}.') from None
        if min(numbers, default=0) < 0:
            raise ValueError(f'id2label.json of "{source}" names a negative number.')
    elif len(lists) == 1:
        numbers = dict(enumerate(lists[0].names))
    if numbers and categories is not None:
        raise ValueError(f'The data set "{source}" names its categories itself: leave out those given.')
    if not numbers:
        if categories is None:
            raise ValueError(
                f'The data set "{source}" does not name its categories: give them, in order (--categories).'
            )
        values = [value for value in range(len(categories) + 1) if value != ignore_index]
        numbers = dict(zip(values, categories, strict=False))
    numbers = {number: numbers[number] for number in sorted(numbers) if number != ignore_index}
    return dict(zip(numbers, read_categories(list(numbers.values())), strict=True))


def _label_table(values: Sequence[int] | Mapping[int, str], ignore_index: int | None) -> np.ndarray:
    """Labels 0, 1, ... for the numbers `values`; all other numbers are unknown, but the ignored one."""
    values = list(values)
    labels = np.full(max([255, ignore_index or 0, *values]) + 1, UNKNOWN)
    labels[values] = np.arange(len(values))
    if ignore_index is not None and ignore_index >= 0:
        labels[ignore_index] = IGNORE_INDEX
    return labels


def _only_one(given, told, what: str, file: Path):
    if given is not None and told is not None:
        raise ValueError(f"{file} tells the {what} already: leave it out of the settings, or of the file.")
    return told if given is None else given


def _choose_split(split: str | None, splits: Mapping[str, Sequence[str]], default: str) -> str:
    """The published name of a split, for that or another name of it."""
    for name, others in splits.items():
        if split == name or split in others or (split is None and name == default):
            return name
    raise ValueError(f'There is no split "{split}": choose from {", ".join(splits)}.')


def split_folders(folder: Path) -> list[str]:
    """Names of the parts of a data set in a folder, each with photos of its own."""
    return sorted(path.parent.name for path in folder.glob("*/images") if path.is_dir())


def _first_folder(what: str, *folders: Path) -> Path:
    for folder in folders:
        if folder.is_dir():
            return folder
    raise ValueError(f"The {what} are missing: there is no folder {' or '.join(map(str, folders))}.")


def _paired_samples(photos: Path, masks: Path) -> datasets.Dataset:
    """Files of one name in two folders. What one of them lacks is noticed when the sample is read."""
    photo_files, mask_files = _list_files(photos, _PHOTOS), _list_files(masks, _MASKS)
    ids = sorted(photo_files | mask_files)
    if not photo_files.keys() & mask_files.keys():
        raise ValueError(f"No photo in {photos} has a mask of its name in {masks}.")
    columns = {
        "id": ids,
        "image": [photo_files.get(name, str(photos / f"{name}.jpg")) for name in ids],
        "mask": [mask_files.get(name, str(masks / f"{name}.png")) for name in ids],
    }
    features = datasets.Features(id=datasets.Value("string"), image=_FILE, mask=_FILE)
    return datasets.Dataset.from_dict(columns, features=features)


def _list_files(folder: Path, endings: Sequence[str]) -> dict[str, str]:
    """Paths of the images in a folder, by their names without ending."""
    files: dict[str, str] = {}
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ValueError(f"The folder {folder} can't be read: {error.strerror}.") from None
    for file in names:
        name, ending = os.path.splitext(file)
        if ending.lower() not in endings or file.startswith("."):
            continue
        if name in files:
            raise ValueError(f"{folder} has two images called {name}: {Path(files[name]).name} and {file}.")
        files[name] = os.path.join(folder, file)
    return files


def _name(sample: Mapping, column: str, what: str) -> str:
    """What a person can find a file by."""
    path = (sample[column] or {}).get("path")
    # Inside a data set's own files a path is often the name alone, and sometimes missing.
    return (
        path
        if path and os.path.dirname(path)
        else f"the {what} of sample {sample['id']}" + (f" ({path})" if path else "")
    )


def _open(sample: Mapping, column: str, what: str) -> Image.Image:
    value, name = sample[column], _name(sample, column, what)
    if not value or (value.get("bytes") is None and value.get("path") is None):
        raise SampleError(f"Sample {sample['id']} has no {what}.")
    try:
        return datasets.Image().decode_example(value)
    except FileNotFoundError:
        raise SampleError(f"There is no {what} {name}.") from None
    except UnidentifiedImageError as error:
        raise SampleError(f"{name} is no image that Pillow can read.") from error
    except Exception as error:  # whatever a damaged file or a decoder comes up with
        raise SampleError(f"Can't read {name}: {' '.join(str(error).split())}") from error


__all__ = ["BENCHMARKS", "SampleError", "SegmentationDataset", "load_segmentation_dataset"]
