"""Training on images with masks (sections 4.2, A.2 and A.3 of the paper): augmented crops, mixed with word maps.

A crop, like a word map, is a pure function of (seed, index): a run sees the same samples with any number of processes
and loader workers, and a resumed run starts at the sample it needs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import IterableDataset, get_dataset_split_names
from PIL import Image
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from ifseg_hf.data.image_files import SampleError
from ifseg_hf.data.segmentation import BENCHMARKS, SegmentationDataset, folder_splits, load_segmentation_dataset
from ifseg_hf.data.vocabularies import read_categories
from ifseg_hf.data.word_maps import WordMapSampler
from ifseg_hf.processing.image_processing_ifseg import IGNORE_INDEX, resize_bilinear, resize_nearest

SCALES = (0.5, 2.0)
LARGEST_SHARE = 0.75  # the largest share of a crop's labelled pixels that one category may cover
TRIES = 10  # crops drawn before one that exceeds LARGEST_SHARE is accepted
NO_LABEL = 255  # value of unlabelled pixels in the masks of pseudo-labels


def load_training_dataset(
    dataset: str, data_dir: str | None = None, split: str | None = None, categories: list | dict | None = None
) -> SegmentationDataset:
    """The training split of a dataset, or another `split`, restricted to `categories`.

    Args:
        dataset, data_dir, split: see [`load_segmentation_dataset`].
        categories: see [`SegmentationDataset.select`].

    Raises:
        `ValueError`: as [`load_segmentation_dataset`], and for a streamed dataset, which has no random access.
    """
    folder = Path(dataset)
    if split is None and (dataset in BENCHMARKS or not (folder / "images").is_dir() or folder_splits(folder)):
        split = "train"
    data = load_segmentation_dataset(dataset, data_dir, split)
    if isinstance(data.samples, IterableDataset):
        raise ValueError(f'"{dataset}" is a stream, but training draws samples at random: download it.')
    return data if categories is None else data.select(categories)


def load_validation_dataset(
    dataset: str, data_dir: str | None = None, categories: list | dict | None = None
) -> SegmentationDataset:
    """The validation split of a dataset (val, validation or test), restricted to `categories`.

    Raises:
        `ValueError`: as [`load_segmentation_dataset`], and for a dataset without such a split.
    """
    splits: list[str] = ["val"]  # of the benchmarks
    if dataset not in BENCHMARKS:
        folder = Path(dataset)
        image_folders = folder.is_dir() and ((folder / "dataset.json").exists() or folder_splits(folder))
        splits = folder_splits(folder) if image_folders else get_dataset_split_names(dataset)
    split = next((name for name in ("val", "validation", "test") if name in splits), None)
    if split is None:
        raise ValueError(f'"{dataset}" has no validation split (val, validation or test): give eval_dataset.')
    data = load_segmentation_dataset(dataset, data_dir, split)
    return data if categories is None else data.select(categories)


def find_labels(data: SegmentationDataset, names: str | None) -> list[int]:
    """Labels of a subset or of categories.

    Args:
        data: the dataset whose labels to look up.
        names: name of one of `data.subsets`, or categories in any form that [`read_categories`] reads; None for no
            label.

    Raises:
        `ValueError`: a name is not in the dataset, or `names` lists no category or all of them.
    """
    if names is None:
        return []
    if names in data.subsets:
        return list(data.subsets[names])
    wanted = list(read_categories(names)) if names.strip(" ,") else []
    for name in wanted:
        if name not in data.names:
            raise ValueError(f'unseen: the dataset has no category "{name}"; it has {", ".join(data.names[:20])}.')
    if not 0 < len(wanted) < len(data.names):
        raise ValueError(f'unseen="{names}" must name at least one of the {len(data.names)} categories, but not all.')
    return [data.names.index(name) for name in wanted]


def read_labels(path: Path) -> np.ndarray:
    """Labels (H, W), int64, from a PNG of labels; 255 becomes -100."""
    with Image.open(path) as image:
        labels = np.asarray(image).astype(np.int64)
    labels[labels == NO_LABEL] = IGNORE_INDEX
    return labels


class Augmentation:
    """Random crop, flip and photometric distortion of an image and its labels, with kornia.

    The photometric distortion is the usual one of semantic segmentation: brightness by up to 1/8 of the range,
    contrast and saturation by a factor from 0.5 to 1.5, hue by up to 18 degrees, each with probability 0.5.
    """

    def __init__(self, crop_size: int):
        import kornia.augmentation as kornia  # an optional dependency

        # Crop and flip do not change values, so the labels are transformed with the image, as its fourth channel.
        self.crop = kornia.RandomCrop((crop_size, crop_size))
        self.flip = kornia.RandomHorizontalFlip(p=0.5)
        self.distort = torch.nn.Sequential(
            kornia.RandomBrightness((0.875, 1.125), p=0.5),
            kornia.RandomContrast((0.5, 1.5), p=0.5),
            kornia.RandomSaturation((0.5, 1.5), p=0.5),
            kornia.RandomHue((-0.05, 0.05), p=0.5),
        )

    def __call__(self, image: np.ndarray, labels: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A crop of `image`, uint8 (H, W, 3), and of its `labels`, int64 (H, W), both at least as large as the crop.

        Returns:
            Float32 (3, c, c) from 0 to 1, and int64 (c, c).
        """
        stacked = torch.cat([torch.from_numpy(image).permute(2, 0, 1) / 255, torch.from_numpy(labels)[None].float()])
        # kornia draws from torch's generator. torch.manual_seed would also reseed the GPUs, which draw dropout.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for _ in range(TRIES):
                cut = self.crop(stacked)
                if largest_share(cut[0, 3]) <= LARGEST_SHARE:
                    break
            cut = self.flip(cut)
            distorted = self.distort(cut[:, :3])
        return distorted[0], cut[0, 3].long()


def largest_share(labels: torch.Tensor) -> float:
    """Share of the most frequent category among the labelled pixels; 1 without labelled pixels."""
    counts = labels[labels != IGNORE_INDEX].long().bincount()
    return (counts.max() / counts.sum()).item() if len(counts) else 1.0


class CropDataset(Dataset):
    """An endless map-style dataset of augmented crops.

    A sample is `{"pixel_values": float32 (3, c, c), "labels": int64 (c, c)}`. Each epoch shows every image once, in a
    new random order. An image is resized so that its short side is `short_side` (or its long side `long_side`, if that
    is smaller) times a random scale from 0.5 to 2, but no side less than `crop_size`, as published: a crop lies within
    its image and has no padding. It is then flipped and distorted; see [`Augmentation`].

    Args:
        data: images with masks.
        crop_size: side c of a crop.
        short_side: short side of an image at scale 1.
        mean, std: mean and standard deviation of the three colours, as in the image processor.
        seed: from 0.
        ignored: labels to replace by -100, such as those of unseen categories.
        long_side: largest long side of an image at scale 1, as in inference; without it there is no limit.
        masks: folder of PNGs named by the images' ids, whose labels (see [`read_labels`]) replace those of `data`.
        on_error: "skip" shows the next image of the epoch in place of one that cannot be used, and prints the error
            once; "fail" raises [`SampleError`].
    """

    def __init__(
        self,
        data: SegmentationDataset,
        crop_size: int,
        short_side: int,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        seed: int = 0,
        ignored: Sequence[int] = (),
        masks: Path | None = None,
        long_side: int | None = None,
        on_error: str = "fail",
    ):
        self.data = data
        self.crop_size, self.short_side, self.long_side = crop_size, short_side, long_side
        self.on_error = on_error
        self._skipped: set[int] = set()
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.seed = seed
        self.ignored = list(ignored)
        self.masks = masks
        self.augment = Augmentation(crop_size)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def position(self, index: int) -> int:
        """Position in `data.samples` of the image that sample `index` shows."""
        epoch, place = divmod(index, len(self.data.samples))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.data.samples))
        return int(self._order[1][place])

    def _read(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and labels at a position in `data.samples`. Raises [`SampleError`]."""
        sample = self.data.samples[position]
        image, labels = self.data.read(sample)
        if self.masks is not None:
            labels = read_labels(self.masks / f"{sample['id']}.png")
        return image, labels

    def _read_or_skip(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and labels of sample `index`, or of the next one that can be used. Raises [`SampleError`]."""
        if self.on_error == "fail":
            return self._read(self.position(index))
        count = len(self.data.samples)
        first = index - index % count  # of the epoch
        for place in range(count):
            position = self.position(first + (index + place) % count)
            if position in self._skipped:
                continue
            try:
                return self._read(position)
            except SampleError as error:
                self._skipped.add(position)
                tqdm.write(f"Skipped: {error}", file=sys.stderr)
        raise SampleError(f"None of the {count} images can be used.")

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, labels = self._read_or_skip(index)
        labels[np.isin(labels, self.ignored)] = IGNORE_INDEX
        random = np.random.default_rng([self.seed, index, 1])  # [seed, epoch] is the generator of an epoch's order
        drawn = random.uniform(*SCALES)
        scale = drawn * self.short_side / min(labels.shape)
        if self.long_side is not None:
            scale = min(scale, drawn * self.long_side / max(labels.shape))
        scale = max(scale, self.crop_size / min(labels.shape))
        height, width = (max(1, round(side * scale)) for side in labels.shape)
        image, labels = resize_bilinear(image, height, width), resize_nearest(labels, height, width)
        pixels, labels = self.augment(image, labels, int(random.integers(2**63)))
        return {"pixel_values": (pixels - self.mean) / self.std, "labels": labels}


class MixedDataset(Dataset):
    """An endless map-style dataset of crops and word maps, the word maps spread evenly among the crops.

    A sample is a sample of [`CropDataset`], or `{"word_map": int64 (g, g), "grid_size": int64 (2,)}` as in
    [`WordMapDataset`].

    Args:
        crops: dataset of the crops, drawn in order.
        word_maps: draws the word maps; not needed with `ratio` 0.
        ratio: share of the samples that are word maps, from 0 to 1.
    """

    def __init__(self, crops: CropDataset, word_maps: WordMapSampler | None = None, ratio: float = 0.0):
        self.crops = crops
        self.word_maps = word_maps
        self.ratio = ratio

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        before = int(index * self.ratio)  # word maps among the samples before this one
        if int((index + 1) * self.ratio) == before:
            return self.crops[index - before]
        word_maps, sizes = self.word_maps(before, 1)
        return {"word_map": torch.from_numpy(word_maps[0]), "grid_size": torch.from_numpy(sizes[0])}


def collate_samples(samples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch with `pixel_values` and `labels` of the crops, and `word_map` and `grid_size` of the word maps."""
    batch = {}
    for kind in ("pixel_values", "word_map"):
        of_kind = [sample for sample in samples if kind in sample]
        batch.update(default_collate(of_kind) if of_kind else {})
    return batch


__all__ = [
    "Augmentation",
    "CropDataset",
    "MixedDataset",
    "collate_samples",
    "find_labels",
    "load_training_dataset",
    "load_validation_dataset",
]
