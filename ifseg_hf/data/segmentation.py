"""Datasets of images with masks: COCO-Stuff, ADE20K, folders of images, and datasets of the Hub.

Every loader returns a [`SegmentationDataset`]: a `datasets` dataset of files, opened when a sample is read, and a table
from mask values to labels. COCO-Stuff has 171 categories, of which 15 are unseen in zero-shot transfer
(appendix A.3 of the paper), or 27 coarse ones (Table 15); ADE20K has 150.
"""

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image, UnidentifiedImageError

from ifseg_hf.data.image_files import MASK_ENDINGS, SPLIT_FILES, SampleError, list_images, read_names
from ifseg_hf.data.masks import (
    LARGEST_VALUE,
    UNKNOWN,
    ignored_values,
    label_table,
    mask_labels,
    named_values,
    read_mask_metadata,
    unique_keys,
)
from ifseg_hf.data.vocabularies import read_categories
from ifseg_hf.processing.image_processing_ifseg import IGNORE_INDEX
from ifseg_hf.processing.image_reading_ifseg import to_array

_FILE = datasets.Image(decode=False)
_MASK_COLUMNS = ("mask", "label", "annotation", "segment", "target", "ground_truth")

# Mask values of things that COCO named but never labelled: street sign, hat, shoe, eye glasses, plate, mirror, window,
# desk, door, blender, hair brush.
_COCO_ABSENT = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
# The names among the 171 that Table 15 omits or spells differently, by their coarse category.
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
# Table 15 lists door, desk and mirror both as things and as stuff. The things are in _COCO_ABSENT: drop them.
_COCO_STUFF_ONLY = ("door", "desk", "mirror")

BENCHMARKS = ("coco-stuff", "coco-stuff-unseen", "coco-stuff-seen", "coco-stuff-coarse", "ade20k")
"""Names of the datasets that [`load_segmentation_dataset`] loads from the folder `data_dir`."""


@dataclass
class SegmentationDataset:
    """
    Images with masks, and the label of each mask value.

    Attributes:
        samples: dataset with the columns **id** (`str`, unique), **image** and **mask** (`datasets.Image(decode=
            False)`: a path or the bytes of a file). No file has been opened.
        names: the categories in order of their labels.
        labels (`np.ndarray`, int64): for each mask value an index into `names`, -100 for pixels to ignore, or -1 for
            a value that stands for no category. Values beyond the table stand for no category either.
        subsets: lists of labels by name, such as seen and unseen categories; may be empty.
        colors (`np.ndarray`, int32): for masks of colours, those that stand for the values 0, 1, ...; see
            [`mask_labels`].
    """

    samples: datasets.Dataset | datasets.IterableDataset
    names: list[str]
    labels: np.ndarray
    subsets: dict[str, list[int]]
    colors: np.ndarray | None = None

    def read(self, sample: Mapping) -> tuple[np.ndarray, np.ndarray]:
        """
        Opens the image and the mask of one of `samples`.

        Returns:
            Two `np.ndarray`: the image `(H, W, 3)`, uint8 RGB, turned upright by its EXIF orientation; and its labels
            `(H, W)`, int64, indices into `names` or -100.

        Raises:
            [`SampleError`]: a file is missing or damaged, or the mask has several channels, another size than the
                image, or a value that stands for no category.
        """
        opened = _open(sample, "image")
        try:
            image = to_array(opened)
        except ValueError as error:
            raise SampleError(f"Can't use {_file_name(sample, 'image')}: {error}") from error
        mask, name = _open(sample, "mask"), _file_name(sample, "mask")
        if mask.size != image.shape[1::-1]:
            raise SampleError(
                f"{name} is {mask.width} x {mask.height} pixels, but its image {_file_name(sample, 'image')} is "
                f"{image.shape[1]} x {image.shape[0]}."
            )
        try:
            return image, self._to_labels(mask)
        except ValueError as error:
            raise SampleError(f"{name} {error}") from None

    def _to_labels(self, mask: Image.Image) -> np.ndarray:
        """Labels of a mask's pixels, int64 (H, W). Raises `ValueError`, whose message lacks the mask's name."""
        return mask_labels(mask, self.labels, self.colors)

    def select(
        self, categories: Sequence[str] | Mapping[str, Sequence[str]], rest: str | None = None
    ) -> "SegmentationDataset":
        """
        The dataset restricted to some categories; pixels of other categories are ignored.

        Args:
            categories: a list of the names to keep, in this order; or `{category: [name, ...]}`, to rename categories
                and to merge several into one.
            rest: a category, such as "background", for the pixels of all other categories in place of ignoring them.
                It comes last unless it is one of `categories`. Unlabelled pixels stay ignored.

        Returns:
            [`SegmentationDataset`] of the same samples. It has the subsets of this one if each category lies within a
            subset and no subset is empty, otherwise none.

        Raises:
            `ValueError`: a name is not in the dataset, or in two of the lists; or there are no other categories for
                `rest`.
        """
        categories = read_categories(categories)
        groups = categories if isinstance(categories, dict) else {name: [name] for name in categories}
        if rest is not None:
            groups = self._with_rest(groups, rest)
        category_of: dict[str, str] = {}
        for category, members in groups.items():
            for name in members:
                if name not in self.names:
                    close = difflib.get_close_matches(name, self.names, n=3)
                    hint = f" Similar: {', '.join(close)}." if close else ""
                    raise ValueError(f'The dataset has no category "{name}".{hint}')
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
            subset_names = {self.names[label] for label in members}
            subsets[subset] = [label for label, group in enumerate(groups.values()) if subset_names.issuperset(group)]
        if not all(subsets.values()) or sum(map(len, subsets.values())) < len(names):
            subsets = {}
        return replace(self, names=names, labels=labels, subsets=subsets)

    def _with_rest(self, groups: Mapping[str, Sequence[str]], rest: str) -> dict[str, list[str]]:
        """`groups`, with all names that are in none of them added to the group `rest`. Raises `ValueError`."""
        selected = {name for members in groups.values() for name in members}
        others = [name for name in self.names if name not in selected]
        if not rest.strip() or not others:
            reason = "give the name of a category" if others else "every category is selected, leave out rest"
            raise ValueError(f'rest="{rest}": {reason}.')
        rest = " ".join(rest.split())
        return {**{name: list(members) for name, members in groups.items()}, rest: [*groups.get(rest, ()), *others]}


def load_segmentation_dataset(
    source: str,
    data_dir: str | os.PathLike | None = None,
    split: str | None = None,
    categories: Sequence[str] | None = None,
    ignore_index: int | Sequence[int] | None = None,
    streaming: bool = False,
) -> SegmentationDataset:
    """
    Loads a dataset of images with masks: a benchmark, a folder, or a dataset of the Hub. No file is opened.

    Args:
        source: one of

            - one of [`BENCHMARKS`], unpacked in `data_dir`: COCO-Stuff (`val2017/*.jpg` and
              `stuffthingmaps_trainval2017/val2017/*.png`), all 171 categories or a subset, or ADE20K's
              SceneParsing (`images/validation/*.jpg`, `annotations/validation/*.png`);
            - a folder with `images/` and `masks/`, or `<split>/images/` and `<split>/masks/`, in which a mask has the
              name of its image (see [`list_images`]; sub-folders included), and a `dataset.json` with `"categories"`,
              the names in order of the mask values (or `{"value": "name"}`, where values have gaps), and
              `"ignore_index"`, the value or values of unlabelled pixels, if there are any; or with `"palette"`, where
              masks have colours (see [`read_mask_metadata`]). Splits may also be files beside `images/`, such as
              `train.txt` and `val.txt`, that list the names;
            - a dataset of the Hub, `owner/name`, or a folder that `datasets.load_dataset` can read, with a column of
              images and one of masks. The names come from `id2label.json` beside the data, or from a column that
              lists the categories of each image.
        data_dir: the folder of a benchmark.
        split: default: the validation split, or the only split.
        categories: the names of the mask values 0, 1, 2, ... except `ignore_index`, if the dataset does not name them.
        ignore_index: the value or values of unlabelled pixels in masks, if the dataset does not name them.
        streaming: stream a dataset of the Hub instead of downloading it first.

    Raises:
        `ValueError`: something is missing or ambiguous. The message says what to do.
    """
    if source in BENCHMARKS:
        if data_dir is None:
            raise ValueError(f"{source} has to be unpacked in a folder: give data_dir.")
        if categories is not None or ignore_index is not None:
            raise ValueError(f"{source} defines its categories and ignore_index: leave these settings out.")
        return _load_ade20k(Path(data_dir), split) if source == "ade20k" else _load_coco(Path(data_dir), split, source)
    if data_dir is not None:
        raise ValueError(f'data_dir is for {", ".join(BENCHMARKS)}: leave it out for "{source}".')
    folder = Path(source)
    image_folders = (folder / "dataset.json").exists() or (folder / "images").is_dir() or folder_splits(folder)
    if folder.is_dir() and image_folders:
        return _load_folder(folder, split, categories, ignore_index)
    close = difflib.get_close_matches(source, BENCHMARKS, n=1, cutoff=0.8)
    if not folder.is_dir() and (close or source.count("/") != 1):
        raise ValueError(
            f'"{source}" is no folder, no dataset of the Hub (owner/name), and none of {", ".join(BENCHMARKS)}.'
            f"{f' Did you mean {close[0]}?' if close else ''}"
        )
    return _load_hub(source, split, categories, ignore_index, streaming)


def _load_coco(folder: Path, split: str | None, view: str) -> SegmentationDataset:
    """COCO-Stuff, whose mask values are 0 to 181, of which 11 never occur, and 255 for unlabelled pixels."""
    part = _choose_split(split, {"val2017": ("val", "validation"), "train2017": ("train", "training")}, "val2017")
    images = _first_folder("images of COCO", folder / part, folder / "images" / part)
    maps = ("stuffthingmaps_trainval2017", "stuffthingmaps")
    masks = _first_folder("masks of COCO-Stuff", *(folder / name / part for name in maps))
    labels = np.full(256, UNKNOWN)
    labels[[value for value in range(182) if value not in _COCO_ABSENT]] = np.arange(171)
    labels[255] = IGNORE_INDEX
    names, unseen = list(read_categories("coco-stuff")), list(read_categories("coco-stuff-unseen"))
    seen = [name for name in names if name not in unseen]
    subsets = {"seen": [names.index(name) for name in seen], "unseen": [names.index(name) for name in unseen]}
    data = SegmentationDataset(paired_samples(images, masks), names, labels, subsets)
    if view == "coco-stuff-coarse":
        return data.select(_coarse_categories(names))
    views = {"coco-stuff": names, "coco-stuff-unseen": unseen, "coco-stuff-seen": seen}
    return data.select(views[view])


def _coarse_categories(names: Sequence[str]) -> dict[str, list[str]]:
    """The fine names, out of the 171 `names`, of each of the 27 coarse categories: Table 15, completed."""
    coarse = {}
    for category, fine in read_categories("coco-stuff-coarse").items():  # type: ignore[union-attr]
        dropped = _COCO_STUFF_ONLY if category == "furniture (things)" else ()
        fine = [name for name in fine if name in names and name not in dropped]
        coarse[category] = fine + _COCO_COARSE.get(category, [])
    return coarse


def _load_ade20k(folder: Path, split: str | None) -> SegmentationDataset:
    """ADE20K's SceneParsing, whose mask values are 1 to 150, and 0 for unlabelled pixels."""
    part = _choose_split(split, {"validation": ("val",), "training": ("train",)}, "validation")
    roots = (folder, folder / "ADEChallengeData2016")
    images = _first_folder("images of ADE20K", *(root / "images" / part for root in roots))
    masks = _first_folder("masks of ADE20K", *(root / "annotations" / part for root in roots))
    names = list(read_categories("ade20k"))
    return SegmentationDataset(paired_samples(images, masks), names, label_table(range(1, 151), [0]), {})


def _load_folder(
    folder: Path, split: str | None, categories: Sequence[str] | None, ignore_index: int | Sequence[int] | None
) -> SegmentationDataset:
    """A folder with `images/` and `masks/`, or with such a pair of folders for each split."""
    file, metadata = folder / "dataset.json", {}
    if file.exists():
        try:
            metadata = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from None
        if not isinstance(metadata, dict):
            raise ValueError(f'{file} should hold {{"categories": [names], "ignore_index": an integer, if any}}.')
    try:
        masks = read_mask_metadata(metadata, categories, ignore_index)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None
    part, listed = _find_split(folder, split)
    samples = paired_samples(part / "images", part / "masks", listed)
    return SegmentationDataset(samples, masks.names, masks.labels, {}, masks.colors)


def _find_split(folder: Path, split: str | None) -> tuple[Path, list[str] | None]:
    """The folder with `images/` and `masks/` of a split, and the names that its file lists. Raises `ValueError`."""
    splits, whole = folder_splits(folder), (folder / "images").is_dir()
    if whole and not splits:
        if split is not None:
            raise ValueError(f'{folder} has no splits: leave out "{split}", or list its images in {split}.txt.')
        return folder, None
    split = split or _default_split(splits)
    if split not in splits:
        problem = f'There is no split "{split}" in {folder}' if split else f"{folder} needs a split"
        raise ValueError(f"{problem}: choose from {', '.join(splits) or 'none, as there is no images/'}.")
    return (folder, read_names(folder / f"{split}.txt")) if whole else (folder / split, None)


def _default_split(splits: Sequence[str]) -> str | None:
    """The validation split, otherwise the only split, otherwise None."""
    validation = next((name for name in ("validation", "val", "test") if name in splits), None)
    return splits[0] if validation is None and len(splits) == 1 else validation


def _load_hub(
    source: str,
    split: str | None,
    categories: Sequence[str] | None,
    ignore_index: int | Sequence[int] | None,
    streaming: bool,
) -> SegmentationDataset:
    """A dataset that `datasets.load_dataset` can read."""
    try:
        if split is None:
            splits = datasets.get_dataset_split_names(source)
            split = _default_split(splits)
            if split is None:
                raise ValueError(f"it has several splits: choose from {', '.join(splits)}.")
        samples = datasets.load_dataset(source, split=split, streaming=streaming)
    except Exception as error:  # datasets, huggingface_hub, its HTTP library and the readers have no common class
        where = "" if Path(source).is_dir() else " is no folder here and"
        reason = " ".join(str(error).split())
        raise ValueError(f'The dataset "{source}"{where} can\'t be loaded: {reason}') from error
    image, mask = _image_columns(source, samples.features or {})
    try:
        ignored = ignored_values(ignore_index)
    except ValueError as error:
        raise ValueError(f'The dataset "{source}" {error}') from None
    names = _hub_categories(source, samples.features, categories, ignored)
    samples = samples.cast_column(image, _FILE).cast_column(mask, _FILE).select_columns([image, mask])
    samples = samples.rename_columns({old: new for old, new in ((image, "image"), (mask, "mask")) if old != new})
    if isinstance(samples, datasets.IterableDataset):
        features = datasets.Features(id=datasets.Value("string"), image=_FILE, mask=_FILE)
        samples = samples.map(lambda row, index: {"id": f"{index:06d}"}, with_indices=True, features=features)
    else:
        samples = samples.add_column("id", [f"{index:06d}" for index in range(len(samples))])
    samples = samples.select_columns(["id", "image", "mask"])
    return SegmentationDataset(samples, list(names.values()), label_table(names, ignored), {})


def _image_columns(source: str, features: Mapping) -> tuple[str, str]:
    """The names of the columns of images and of masks. Raises `ValueError` if there are not exactly one of each."""
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    masks = [name for name in columns if any(word in name.lower() for word in _MASK_COLUMNS)]
    images = [name for name in columns if name not in masks]
    images = [name for name in images if name in ("image", "pixel_values")] or images
    if len(images) != 1 or len(masks) != 1:
        raise ValueError(
            f'"{source}" should have one column of images and one of masks. Its columns of type Image are: '
            f'{", ".join(columns) or "none"}. Name them "image" and "mask".'
        )
    return images[0], masks[0]


def _hub_categories(
    source: str, features: Mapping, categories: Sequence[str] | None, ignored: Sequence[int]
) -> dict[int, str]:
    """The name of each mask value, from the dataset's metadata or `categories`. Raises `ValueError`."""
    file: str | Path = Path(source) / "id2label.json"
    if not Path(source).is_dir():
        try:
            file = hf_hub_download(source, "id2label.json", repo_type="dataset")
        except EntryNotFoundError:
            file = ""
    lists = [getattr(feature, "feature", None) for feature in features.values()]
    lists = [feature for feature in lists if isinstance(feature, datasets.ClassLabel)]
    names: dict[int, str] = {}
    if file and Path(file).is_file():
        try:
            id2label = json.loads(Path(file).read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
            names = {int(value): name for value, name in id2label.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            raise ValueError(f'id2label.json of "{source}" should hold {{"mask value": "name", ...}}.') from None
        if not all(0 <= value <= LARGEST_VALUE for value in names):
            raise ValueError(f'id2label.json of "{source}" names a mask value outside of 0 to {LARGEST_VALUE}.')
    elif len(lists) == 1:
        names = dict(enumerate(lists[0].names))
    if names and categories is not None:
        raise ValueError(f'The dataset "{source}" names its categories: leave out --categories.')
    if not names:
        if categories is None:
            raise ValueError(
                f'The dataset "{source}" does not name its categories: give them, in order (--categories).'
            )
        names = named_values(categories, ignored)
    names = {value: names[value] for value in sorted(names) if value not in ignored}
    return dict(zip(names, read_categories(list(names.values())), strict=True))


def _choose_split(split: str | None, splits: Mapping[str, Sequence[str]], default: str) -> str:
    """The published name of a split, which may be given by one of its aliases. Raises `ValueError`."""
    for name, aliases in splits.items():
        if split == name or split in aliases or (split is None and name == default):
            return name
    raise ValueError(f'There is no split "{split}": choose from {", ".join(splits)}.')


def folder_splits(folder: Path) -> list[str]:
    """Names of the splits of a folder: its subfolders that have a folder `images`, or files that list its images."""
    if (folder / "images").is_dir():
        return sorted(name for name in SPLIT_FILES if (folder / f"{name}.txt").is_file())
    return sorted(path.parent.name for path in folder.glob("*/images") if path.is_dir())


def _first_folder(what: str, *folders: Path) -> Path:
    """The first of `folders` that exists. Raises `ValueError`."""
    for folder in folders:
        if folder.is_dir():
            return folder
    raise ValueError(f"The {what} are missing: there is no folder {' or '.join(map(str, folders))}.")


def paired_samples(images: Path, masks: Path, listed: Sequence[str] | None = None) -> datasets.Dataset:
    """
    The samples of two folders with their sub-folders, paired by file name.

    `listed` has the names to select; the default is all. A missing file raises an error when its sample is read.
    """
    image_files, mask_files = list_images(images), list_images(masks, MASK_ENDINGS)
    ids = sorted(image_files | mask_files) if listed is None else listed
    if not image_files.keys() & mask_files.keys():
        raise ValueError(f"No image in {images} has a mask of the same name in {masks}.")
    columns = {
        "id": ids,
        "image": [image_files.get(name, str(images / f"{name}.jpg")) for name in ids],
        "mask": [mask_files.get(name, str(masks / f"{name}.png")) for name in ids],
    }
    features = datasets.Features(id=datasets.Value("string"), image=_FILE, mask=_FILE)
    return datasets.Dataset.from_dict(columns, features=features)


def _file_name(sample: Mapping, column: str) -> str:
    """The path of a sample's file; for files without a folder, as in archives, a text with the sample's id."""
    path = (sample[column] or {}).get("path")
    if path and os.path.dirname(path):
        return path
    return f"the {column} of sample {sample['id']}" + (f" ({path})" if path else "")


def _open(sample: Mapping, column: str) -> Image.Image:
    """The opened image or mask of a sample. Raises [`SampleError`]."""
    value, name = sample[column], _file_name(sample, column)
    if not value or (value.get("bytes") is None and value.get("path") is None):
        raise SampleError(f"Sample {sample['id']} has no {column}.")
    try:
        return datasets.Image().decode_example(value)
    except FileNotFoundError:
        raise SampleError(f"There is no {column} {name}.") from None
    except UnidentifiedImageError as error:
        raise SampleError(f"{name} is no image that Pillow can read.") from error
    except Exception as error:  # decoders raise many kinds of errors for a damaged file
        raise SampleError(f"Can't read {name}: {' '.join(str(error).split())}") from error


__all__ = ["BENCHMARKS", "SegmentationDataset", "load_segmentation_dataset", "paired_samples"]
