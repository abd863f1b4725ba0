"""Photos with masks as training samples (sections 4.2, A.2, A.3 of the paper): augmented crops, word maps among them.

As a word map is, a sample is a pure function of (seed, index): a run sees the same samples for any number of processes
and loader workers, and a resumed run starts at the sample it needs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import IterableDataset, get_dataset_split_names
from PIL import Image
from torch.utils.data import Dataset, default_collate

from ifseg_hf.data.segmentation import BENCHMARKS, SegmentationDataset, load_segmentation_dataset, split_folders
from ifseg_hf.data.word_maps import WordMapSampler
from ifseg_hf.processing.image_processing_ifseg import IGNORE_INDEX, resize_bilinear, resize_nearest

SCALES = (0.5, 2.0)
LARGEST_SHARE = 0.75  # of one category in a crop
TRIES = 10  # crops drawn before one with a larger share is taken after all
NO_LABEL = 255  # in masks that are written here


def load_training_dataset(
    dataset: str, data_dir: str | None = None, split: str | None = None, categories: list | dict | None = None
) -> SegmentationDataset:
    """As [`load_segmentation_dataset`], but of a data set with parts the one for training, and with `categories` selected.

    Raises `ValueError`, also for a data set that comes as a stream: samples are drawn at random.
    """
    if split is None and (dataset in BENCHMARKS or not (Path(dataset) / "images").is_dir()):
        split = "train"
    data = load_segmentation_dataset(dataset, data_dir, split)
    if isinstance(data.samples, IterableDataset):
        raise ValueError(f'"{dataset}" comes as a stream, and training draws samples at random.')
    return data if categories is None else data.select(categories)


def load_validation_dataset(
    dataset: str, data_dir: str | None = None, categories: list | dict | None = None
) -> SegmentationDataset:
    """The photos for validation of a data set that has them, with `categories` selected. Raises `ValueError`."""
    splits: list[str] = ["val"]  # a benchmark's
    if dataset not in BENCHMARKS:
        folder = Path(dataset)
        own = folder.is_dir() and ((folder / "dataset.json").exists() or split_folders(folder))
        splits = split_folders(folder) if own else get_dataset_split_names(dataset)
    split = next((name for name in ("val", "validation", "test") if name in splits), None)
    if split is None:
        raise ValueError(f'"{dataset}" has no photos for validation (val, validation or test): give eval_dataset.')
    data = load_segmentation_dataset(dataset, data_dir, split)
    return data if categories is None else data.select(categories)


def find_labels(data: SegmentationDataset, names: str | None) -> list[int]:
    """Labels of the subset called `names`, or of the names in it with commas between them; none for None.

    Raises `ValueError` for a name that the data does not have.
    """
    if names is None:
        return []
    if names in data.subsets:
        return list(data.subsets[names])
    wanted = [" ".join(name.split()) for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in data.names:
            raise ValueError(f'unseen: the data has no category "{name}"; it has {", ".join(data.names[:20])}.')
    if not 0 < len(wanted) < len(data.names):
        raise ValueError(f'unseen="{names}" must name at least one of the {len(data.names)} categories, but not all.')
    return [data.names.index(name) for name in wanted]


def read_labels(path: Path) -> np.ndarray:
    """(H, W) int64 from a PNG of labels: 255 becomes -100."""
    with Image.open(path) as image:
        labels = np.asarray(image).astype(np.int64)
    labels[labels == NO_LABEL] = IGNORE_INDEX
    return labels


class Augmentation:
    """Random crop, flip and photometric distortion of a photo and its labels, by kornia.

    The photometric distortion is the customary one of semantic segmentation: brightness by up to 1/8 of the range,
    contrast and saturation by a factor from 0.5 to 1.5, hue by up to 18 degrees, each for every other photo.
    """

    def __init__(self, crop_size: int):
        import kornia.augmentation as kornia  # not needed for anything else

        # Cut out and mirrored, numbers stay what they are: labels can ride along as a fourth channel. What a photo is
        # too small for becomes grey, the zero of the normalised image, and has no label.
        margin = (0.5, 0.5, 0.5, float(IGNORE_INDEX))
        self.crop = kornia.RandomCrop((crop_size, crop_size), pad_if_needed=True, fill=margin)
        self.flip = kornia.RandomHorizontalFlip(p=0.5)
        self.distort = torch.nn.Sequential(
            kornia.RandomBrightness((0.875, 1.125), p=0.5),
            kornia.RandomContrast((0.5, 1.5), p=0.5),
            kornia.RandomSaturation((0.5, 1.5), p=0.5),
            kornia.RandomHue((-0.05, 0.05), p=0.5),
        )

    def __call__(self, photo: np.ndarray, labels: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (H, W, 3) and int64 (H, W) -> float32 (3, c, c) from 0 to 1 and int64 (c, c)."""
        stacked = torch.cat([torch.from_numpy(photo).permute(2, 0, 1) / 255, torch.from_numpy(labels)[None].float()])
        # kornia draws from torch's generator. Not manual_seed: that would reseed those of GPUs, which draw dropout.
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
    """Of the most frequent category among the labelled pixels; 1 where there are none."""
    counts = labels[labels != IGNORE_INDEX].long().bincount()
    return (counts.max() / counts.sum()).item() if len(counts) else 1.0


class CropDataset(Dataset):
    """Augmented crops of photos, without end: `{"pixel_values": float32 (3, c, c), "labels": int64 (c, c)}`.

    The photos come in a new random order each epoch, resized so that their short side is `short_side` times a random
    scale from 0.5 to 2, then cropped, flipped and distorted; see [`Augmentation`].

    Args:
        data: what to read. A photo that cannot be used raises its `SampleError`.
        crop_size: side c of a crop.
        short_side: of a photo at scale 1.
        mean, std: of the three colours, as the image processor has them.
        seed: from 0.
        ignored: labels that count as none, such as those of unseen categories.
        masks: folder of PNGs, one a photo by its id, whose labels (see [`read_labels`]) take the place of the data's.
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
    ):
        self.data = data
        self.short_side = short_side
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.seed = seed
        self.ignored = list(ignored)
        self.masks = masks
        self.augment = Augmentation(crop_size)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def position(self, index: int) -> int:
        """Which photo sample `index` shows."""
        epoch, place = divmod(index, len(self.data.samples))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.data.samples))
        return int(self._order[1][place])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.data.samples[self.position(index)]
        photo, labels = self.data.read(sample)
        if self.masks is not None:
            labels = read_labels(self.masks / f"{sample['id']}.png")
        labels[np.isin(labels, self.ignored)] = IGNORE_INDEX
        random = np.random.default_rng([self.seed, index, 1])  # with a third number: no generator of an epoch
        scale = random.uniform(*SCALES) * self.short_side / min(labels.shape)
        height, width = (max(1, round(side * scale)) for side in labels.shape)
        photo, labels = resize_bilinear(photo, height, width), resize_nearest(labels, height, width)
        pixels, labels = self.augment(photo, labels, int(random.integers(2**63)))
        return {"pixel_values": (pixels - self.mean) / self.std, "labels": labels}


class MixedDataset(Dataset):
    """Of `ratio` of the samples word maps, spread evenly, and photos in their places between them.

    A word map is `{"word_map": int64 (g, g), "grid_size": int64 (2,)}`; see [`word_map_stream`].
    """

    def __init__(self, photos: CropDataset, word_maps: WordMapSampler | None = None, ratio: float = 0.0):
        self.photos = photos
        self.word_maps = word_maps
        self.ratio = ratio

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        before = int(index * self.ratio)  # word maps among the samples before this one
        if int((index + 1) * self.ratio) == before:
            return self.photos[index - before]
        word_maps, sizes = self.word_maps(before, 1)
        return {"word_map": torch.from_numpy(word_maps[0]), "grid_size": torch.from_numpy(sizes[0])}


def collate_samples(samples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch with `pixel_values` and `labels` of the photos and `word_map` and `grid_size` of the word maps."""
    batch = {}
    for kind in ("pixel_values", "word_map"):
        same = [sample for sample in samples if kind in sample]
        batch.update(default_collate(same) if same else {})
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
