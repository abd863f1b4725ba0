"""Scenes for pre-training and evaluation: mosaics of named images and street crops, and street views with named boxes.

A scene is an image, usually square, with named boxes, which are the only targets of pre-training. The masks of street
images are used to choose boxes that show one object, and as the ground truth of evaluation.
"""

import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ifseg_hf.data.segmentation import SegmentationDataset

HELD_OUT = 5000  # the last images of the last file are not used for training
IMAGE_SIZE = 64
THIN = ("pole", "sign", "fence", "pedestrian", "bicyclist")  # street objects that rarely fill a box


@dataclass
class NamedImages:
    """`pixels` (images, 64, 64, 3) uint8, `labels` (images,) int64, indices into `names`."""

    pixels: np.ndarray
    labels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: slice) -> "NamedImages":
        return NamedImages(self.pixels[rows], self.labels[rows], self.names)


@dataclass
class Streets:
    """`images` (images, H, W, 3) uint8, `masks` (images, H, W) uint8: indices into `names`, or `ignore_index`."""

    images: np.ndarray
    masks: np.ndarray
    names: list[str]
    ignore_index: int


@dataclass
class Scene:
    """`image` (H, W, 3) uint8; `boxes` (n, 4) float32: left, top, right, bottom as shares of the image's width and
    height; `labels`: n indices into the names."""

    image: np.ndarray
    boxes: np.ndarray
    labels: list[int]


def load_named_images(folder: str | Path, cache: str | Path) -> NamedImages:
    """Reads the parquet files of `folder`, decoded the first time into a memory-mapped array in the folder `cache`."""
    import pyarrow.parquet as parquet

    files = sorted(Path(folder).glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"no parquet files with images in {folder}")
    features = json.loads(parquet.read_schema(files[0]).metadata[b"huggingface"])["info"]["features"]
    names = features["label"]["names"]
    pixels_file, labels_file = Path(cache) / "images.npy", Path(cache) / "image_labels.npy"
    if not labels_file.exists():
        Path(cache).mkdir(parents=True, exist_ok=True)
        count = sum(parquet.read_metadata(file).num_rows for file in files)
        shape = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
        pixels = np.lib.format.open_memmap(pixels_file, mode="w+", dtype=np.uint8, shape=shape)
        labels, row = np.empty(count, np.int64), 0
        for file in files:
            table = parquet.read_table(file, columns=["image", "label"])
            labels[row : row + len(table)] = table["label"].to_numpy()
            for encoded in table["image"]:
                image = Image.open(io.BytesIO(encoded["bytes"].as_py())).convert("RGB")
                pixels[row] = image if image.size == shape[1:3] else image.resize(shape[1:3])
                row += 1
        pixels.flush()
        np.save(labels_file, labels)  # written last: where this file exists, the pixels are complete
    return NamedImages(np.load(pixels_file, mmap_mode="r"), np.load(labels_file), names)


def load_streets(folder: str | Path, split: str) -> Streets:
    """Street images and masks of one split of a folder: `dataset.json`, `SPLIT/images`, `SPLIT/masks`."""
    metadata = json.loads((Path(folder) / "dataset.json").read_text())
    images = sorted((Path(folder) / split / "images").iterdir())
    masks = [Path(folder) / split / "masks" / f"{image.stem}.png" for image in images]
    return Streets(
        np.stack([np.asarray(Image.open(file).convert("RGB")) for file in images]),
        np.stack([np.asarray(Image.open(file)) for file in masks]),
        metadata["categories"],
        metadata["ignore_index"],
    )


def all_names(images: NamedImages, streets: Streets | None) -> list[str]:
    """The images' names, then the street names that are not among them. Labels of scenes are indices into this list."""
    return images.names + [name for name in (streets.names if streets else []) if name not in images.names]


def street_boxes(streets: Streets, sides=(24, 36, 54, 80, 120, 180), large=0.7, thin=0.35) -> np.ndarray:
    """Boxes of street images that show one object: rows (image, left, top, side, street name), int64.

    A large object fills at least the share `large` of its box. A thin object (see `THIN`) fills at least `thin`, and
    more than any other thin object. Boxes of fewer than 36 pixels are kept for thin objects only.
    """
    height, width = streets.masks.shape[1:]
    is_thin = np.array([name in THIN for name in streets.names])
    rows = []
    for image, mask in enumerate(streets.masks):
        one_hot = mask[None] == np.arange(len(streets.names))[:, None, None]
        table = np.zeros((len(streets.names), height + 1, width + 1), np.int32)
        table[:, 1:, 1:] = one_hot.cumsum(1).cumsum(2)
        for side in sides:
            top = np.arange(0, height - side + 1, side // 3)
            left = np.arange(0, width - side + 1, side // 3)
            y, x = top[:, None], left[None]
            count = table[:, y + side, x + side] - table[:, y, x + side] - table[:, y + side, x] + table[:, y, x]
            share = count / side**2
            fits = share >= np.where(is_thin, thin if side <= 80 else 0.5, large if side >= 36 else 2)[:, None, None]
            # Thin objects before the large objects behind them.
            name = np.where(fits, share + is_thin[:, None, None], -1).argmax(0)
            y, x = np.nonzero(fits.any(0))
            rows.append(np.stack([np.full(len(y), image), left[x], top[y], np.full(len(y), side), name[y, x]], axis=1))
    return np.concatenate(rows)


def rectangles(rng: random.Random, count: int, low: float = 0.3) -> list[tuple[float, float, float, float]]:
    """Cuts the unit square into `count` rectangles (left, top, right, bottom).

    Repeatedly cuts one of the largest rectangles in two across its longer side, at a share from `low` to 1 - `low`.
    """
    parts = [(0.0, 0.0, 1.0, 1.0)]
    while len(parts) < count:
        parts.sort(key=lambda p: (p[2] - p[0]) * (p[3] - p[1]) * rng.uniform(0.5, 1))
        left, top, right, bottom = parts.pop()
        at = rng.uniform(low, 1 - low)
        wide, tall = right - left, bottom - top
        if wide > tall or (wide == tall and rng.random() < 0.5):
            middle = left + at * wide
            parts += [(left, top, middle, bottom), (middle, top, right, bottom)]
        else:
            middle = top + at * tall
            parts += [(left, top, right, middle), (left, middle, right, bottom)]
    return parts


def cells(side: int) -> list[tuple[float, float, float, float]]:
    """The unit square as side x side equal cells."""
    return [(x / side, y / side, (x + 1) / side, (y + 1) / side) for y in range(side) for x in range(side)]


def reading_order(boxes: np.ndarray) -> list[int]:
    """Indices of boxes (n, 4) sorted by their upper left corners, from top to bottom, then from left to right."""
    return sorted(range(len(boxes)), key=lambda i: (round(float(boxes[i][1]), 3), float(boxes[i][0])))


class SceneMaker:
    """Draws random scenes of named images and street images.

    Args:
        crop: the smallest share of an image's area that a scene shows.
        antialias: whether street views are shrunk with antialiasing; the image processor shrinks without.

    `street_share` is the share of street views among the scenes of [`draw`].
    """

    def __init__(self, images: NamedImages, streets: Streets | None, crop: float = 0.4, antialias: bool = True):
        self.images, self.streets, self.crop, self.antialias = images, streets, crop, antialias
        self.street_share = 0.12
        self.names = all_names(images, streets)
        self.rows_of = [np.flatnonzero(images.labels == i) for i in range(len(images.names))]
        # A compromise between the frequencies of the names and equal shares.
        weight = np.array([len(rows) for rows in self.rows_of]) ** 0.5
        self.name_share = (weight / weight.sum()).cumsum()
        if streets is not None:
            self.street_label = [self.names.index(name) for name in streets.names]
            self.boxes = street_boxes(streets)
            self.boxes_of_name = [np.flatnonzero(self.boxes[:, 4] == i) for i in range(len(streets.names))]
            self.boxes_of_image = [np.flatnonzero(self.boxes[:, 0] == i) for i in range(len(streets.images))]

    def named_image(self, rng: random.Random) -> tuple[Image.Image, tuple, int]:
        """A random image, the box (left, top, right, bottom) to crop from it in pixels, and its label."""
        label = int(np.searchsorted(self.name_share, rng.random()))
        row = int(rng.choice(self.rows_of[min(label, len(self.rows_of) - 1)]))
        area, ratio = rng.uniform(self.crop, 1), rng.uniform(0.75, 1.33) ** 0.5
        wide, tall = min(1, area**0.5 * ratio) * IMAGE_SIZE, min(1, area**0.5 / ratio) * IMAGE_SIZE
        left, top = rng.uniform(0, IMAGE_SIZE - wide), rng.uniform(0, IMAGE_SIZE - tall)
        part = (left, top, left + wide, top + tall)
        return Image.fromarray(self.images.pixels[row]), part, int(self.images.labels[row])

    def street_crop(self, rng: random.Random) -> tuple[Image.Image, tuple, int]:
        """A random street crop that shows one object, as [`named_image`]; every name has equal probability."""
        name = rng.randrange(len(self.boxes_of_name))
        number, left, top, side, _ = self.boxes[rng.choice(self.boxes_of_name[name])].tolist()
        image = Image.fromarray(self.streets.images[number][top : top + side, left : left + side])
        return image, (0, 0, side, side), self.street_label[name]

    def mosaic(self, rng: random.Random, size: int | tuple[int, int], parts: list, street_share: float = 0.1) -> Scene:
        """A scene with an image or a street crop in each rectangle of `parts`; `size`: side, or (height, width)."""
        height, width = (size, size) if isinstance(size, int) else size
        canvas = Image.new("RGB", (width, height))
        boxes, labels = [], []
        for left, top, right, bottom in parts:
            crop = self.streets is not None and rng.random() < street_share
            image, part, label = self.street_crop(rng) if crop else self.named_image(rng)
            x0, y0, x1, y1 = round(left * width), round(top * height), round(right * width), round(bottom * height)
            image = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=part)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            canvas.paste(image, (x0, y0))
            boxes.append((left, top, right, bottom))
            labels.append(label)
        return Scene(np.asarray(canvas), np.array(boxes, np.float32), labels)

    def street(self, rng: random.Random, size: int, short_side: int = 256, most: int = 6) -> Scene:
        """A random square of a street image with up to `most` boxes.

        Objects are about as large as in the whole image resized to a short side of `short_side`.
        """
        count, height, width, _ = self.streets.images.shape
        number = rng.randrange(count)
        side = min(height, width, round(size * height / short_side * 2 ** rng.uniform(-0.7, 0.7)))
        left, top = rng.randint(0, width - side), rng.randint(0, height - side)
        rows = self.boxes[self.boxes_of_image[number]]
        inside = (rows[:, 1] >= left) & (rows[:, 2] >= top)
        inside &= (rows[:, 1] + rows[:, 3] <= left + side) & (rows[:, 2] + rows[:, 3] <= top + side)
        rows = rows[inside]
        # Takes one box of each name in turn, because most boxes show road or sky.
        groups = [np.flatnonzero(rows[:, 4] == name).tolist() for name in set(rows[:, 4].tolist())]
        groups = [rng.sample(group, len(group)) for group in groups]
        chosen = [group[turn] for turn in range(most) for group in groups if turn < len(group)][:most]
        rows = rows[chosen].reshape(-1, 5)
        x, y = rows[:, 1] - left, rows[:, 2] - top
        boxes = (np.stack([x, y, x + rows[:, 3], y + rows[:, 3]], 1) / side).astype(np.float32)
        square = Image.fromarray(self.streets.images[number][top : top + side, left : left + side])
        if self.antialias:
            square = square.resize((size, size), Image.Resampling.BILINEAR)
        else:
            square = square.transform(
                (size, size), Image.Transform.EXTENT, (0, 0, side, side), Image.Resampling.BILINEAR
            )
        image = np.asarray(square)
        if rng.random() < 0.5:
            image = image[:, ::-1]
            boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
        return Scene(image, boxes, [self.street_label[n] for n in rows[:, 4]])

    def draw(self, rng: random.Random, size: int) -> Scene:
        """A random scene of pre-training: a street view, an image, a mosaic of 2 to 4 rectangles, or a grid."""
        if self.streets is not None and rng.random() < self.street_share:
            return self.street(rng, size)
        kind = rng.random()
        if kind < 0.3:
            parts = cells(1)
        elif kind < 0.75:
            parts = rectangles(rng, rng.randint(2, 4))
        else:
            parts = cells(2 if size < 160 or rng.random() < 0.5 else rng.choice((3, 4)))
        return self.mosaic(rng, size, parts)


def evaluation_scenes(images: NamedImages, words: list[str], count: int, seed: int, size: int = 128):
    """Yields `count` mosaics of 1 to 4 whole images with names in `words`, the same for the same `seed`.

    Each is an image (size, size, 3) and a mask of word indices (size, size).
    """
    rows = [np.flatnonzero(images.labels == images.names.index(word)) for word in words]
    rng = random.Random(seed)
    for _ in range(count):
        parts = rectangles(rng, rng.randint(1, 4))
        canvas, target = Image.new("RGB", (size, size)), np.zeros((size, size), np.int64)
        for left, top, right, bottom in parts:
            word = rng.randrange(len(words))
            image = Image.fromarray(images.pixels[int(rng.choice(rows[word]))])
            x0, y0, x1, y1 = (round(v * size) for v in (left, top, right, bottom))
            canvas.paste(image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR), (x0, y0))
            target[y0:y1, x0:x1] = word
        yield np.asarray(canvas), target


def mosaic_data(images: NamedImages, words: list[str], count: int, seed: int, size: int = 128) -> SegmentationDataset:
    """The mosaics of [`evaluation_scenes`] as a dataset of images with masks."""
    rows: dict[str, list] = {"id": [], "image": [], "mask": []}
    for number, (image, target) in enumerate(evaluation_scenes(images, words, count, seed, size)):
        rows["id"].append(f"{number:04d}")
        for column, array in (("image", image), ("mask", target.astype(np.uint8))):
            file = io.BytesIO()
            Image.fromarray(array).save(file, "PNG", compress_level=1)
            rows[column].append({"bytes": file.getvalue(), "path": None})
    encoded = datasets.Image(decode=False)
    features = datasets.Features(id=datasets.Value("string"), image=encoded, mask=encoded)
    return SegmentationDataset(datasets.Dataset.from_dict(rows, features=features), words, np.arange(len(words)), {})
