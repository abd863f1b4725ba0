"""Training images and what is known of them: names, named boxes, captions. No mask is ever a target."""

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import load_dataset
from PIL import Image
from tqdm.auto import tqdm

from ifseg_hf.data.image_files import SampleError, check_on_error
from ifseg_hf.data.segmentation import SegmentationDataset, load_segmentation_dataset
from ifseg_hf.nano.features import View, middle
from ifseg_hf.nano.vocabulary import Vocabulary
from ifseg_hf.processing.image_reading_ifseg import to_array

# A box: top, left, bottom and right as fractions of the height and width of the part of the image that is used.
Box = tuple[float, float, float, float]

PATCH = 16
# Short sides in pixels at which images are seen. Scenes are seen larger than single objects, which fill their images.
CAPTIONED, SCENES, OBJECTS, STREETS = (288, 384), (176, 224, 272), (128, 176, 224, 288), (384,)
SCENE_SOURCES = ("corel", "intel", "weather")
# Boxes that are drawn in an image with a mask, and categories of streets that are too thin to fill a large box.
TRIES = {"coco": 400, "street": 120}
THIN = ("bicyclist", "car", "fence", "pedestrian", "pole", "sign")
THIN_SHARE = 0.5  # of a small box, that a thin category covers at least


@dataclass
class Example:
    """
    An image at one size, with the position of its features.

    Args:
        source: the data set; view: position in the [`FeatureCache`].
        name: the name of the whole image; boxes: names of boxes around objects; captions: sentences, and
            caption_names: the names in at least two of them; filled: boxes that one category fills, by its name; thin:
            small boxes of which a thin category covers half, by its name.
    """

    source: str
    view: int
    name: int | None = None
    boxes: list[tuple[Box, int]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    caption_names: list[int] = field(default_factory=list)
    filled: dict[int, list[Box]] = field(default_factory=dict)
    thin: dict[int, list[Box]] = field(default_factory=dict)


class TrainingImages:
    """
    The images of pre-training, the sizes at which they are seen, and their [`Example`]s.

    Args:
        world: folder of parquet files with the features `source, name, captions, boxes, image`.
        coco, street: folders of images with masks, from which filled boxes are chosen; of `coco` every second image,
            since the others are for development.
        on_error: "skip" reads every image first, and names and leaves out those that cannot be read; with "fail"
            [`image`] raises [`SampleError`] for such an image.
    """

    def __init__(
        self,
        world: Path,
        coco: Path | None,
        street: Path | None,
        vocabulary: Vocabulary,
        seed: int = 0,
        on_error: str = "fail",
    ):
        check_on_error(on_error)
        files = sorted(str(file) for file in Path(world).glob("*.parquet"))
        self.world = load_dataset("parquet", data_files=files, split="train")
        self.masked: list[tuple[str, SegmentationDataset, int]] = []
        for source, folder, split, step in (("coco", coco, None, 2), ("street", street, "train", 1)):
            if folder is not None:
                data = load_segmentation_dataset(str(folder), split=split)
                self.masked += [(source, data, i) for i in range(0, len(data.samples), step)]
        self.vocabulary = vocabulary
        self.views: list[View] = []
        self.rows = self.world.remove_columns("image").to_list()
        rng = random.Random(seed)
        for i, row in enumerate(self.rows):
            self.views += [View(i, side) for side in self._short_sides(row, rng)]
        self.views += [View(len(self.rows) + i, STREETS[0]) for i in range(len(self.masked))]
        if on_error == "skip":
            self._leave_out_unreadable()

    @staticmethod
    def _short_sides(row: Mapping, rng: random.Random) -> Sequence[int]:
        if row["captions"] or row["boxes"]:
            return CAPTIONED
        return [rng.choice(SCENES if row["source"] in SCENE_SOURCES else OBJECTS)]

    def _leave_out_unreadable(self) -> None:
        """Removes the views of images that cannot be read, and prints the error of each."""
        unreadable = set()
        for index in tqdm(sorted({view.image for view in self.views}), desc="reading", unit="image"):
            try:
                self.image(index)
            except SampleError as error:
                unreadable.add(index)
                tqdm.write(f"Skipped: {error}", file=sys.stderr)
        self.views = [view for view in self.views if view.image not in unreadable]
        if not self.views:
            raise ValueError("None of the images can be read.")

    def image(self, index: int) -> Image.Image:
        """The image at a position. Raises [`SampleError`]."""
        if index >= len(self.rows):
            return Image.fromarray(self._read(index)[0])
        try:
            return Image.fromarray(to_array(self.world[index]["image"]))
        except Exception as error:  # a damaged image raises errors of many kinds
            row = self.rows[index]
            about = row["name"] or next(iter(row["captions"]), "without a name")
            reason = " ".join(str(error).split())
            raise SampleError(f"Image {index} of {row['source']} ({about}) can't be read: {reason}.") from None

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and labels of an image with a mask."""
        _, data, i = self.masked[index - len(self.rows)]
        return data.read(data.samples[i])

    def examples(self, seed: int = 1) -> list[Example]:
        """What is known of each view. Images of which nothing is known are left out."""
        rng = random.Random(seed)
        examples = []
        for position, view in enumerate(self.views):
            if view.image < len(self.rows):
                example = self._named(view.image, position)
            else:
                example = self._filled(view, position, rng)
            if example.name is not None or example.boxes or example.caption_names or example.filled or example.thin:
                examples.append(example)
        return examples

    def _named(self, index: int, position: int) -> Example:
        row, find = self.rows[index], self.vocabulary.find_label
        boxes = []
        if row["boxes"]:
            used = middle(*self.world[index]["image"].size)
            for box in row["boxes"]:
                name, inside = find(box["name"]), fractions(box, used)
                if name is not None and inside is not None:
                    boxes.append((inside, name))
        return Example(
            row["source"],
            position,
            name=find(row["name"]) if row["name"] else None,
            boxes=boxes,
            captions=row["captions"],
            caption_names=self.vocabulary.in_captions(row["captions"]),
        )

    def _filled(self, view: View, position: int, rng: random.Random) -> Example:
        source, data, _ = self.masked[view.image - len(self.rows)]
        labels = self._read(view.image)[1]
        left, top, right, bottom = middle(labels.shape[1], labels.shape[0])
        labels = labels[top:bottom, left:right]
        names = [self.vocabulary.find_label(name) for name in data.names]
        scale = view.short_side / min(labels.shape)
        grid = [-(-round(side * scale) // PATCH) for side in labels.shape]
        shares = patch_shares(labels, len(names), *grid)
        filled = self._by_name(names, filled_boxes(shares, rng, TRIES[source]))
        thin: dict[int, list[Box]] = {}
        if source == "street":
            categories = [data.names.index(name) for name in THIN if name in data.names]
            thin = self._by_name(names, thin_boxes(shares, rng, categories))
        return Example(source, position, filled=filled, thin=thin)

    @staticmethod
    def _by_name(names: Sequence[int | None], boxes: Mapping[int, list[Box]]) -> dict[int, list[Box]]:
        """Boxes by the name of their label, without labels that have no name."""
        found = {names[label]: boxes_of_label for label, boxes_of_label in boxes.items()}
        return {name: boxes_of_name for name, boxes_of_name in found.items() if name is not None}


def fractions(box: Mapping[str, float], used: tuple[int, int, int, int]) -> Box | None:
    """
    A box in pixels as fractions of the part of its image that is used; `None` if the box is outside of that part.

    Args:
        box: `x`, `y`, `width` and `height`; used: left, top, right and bottom.
    """
    left, top, right, bottom = used
    width, height = right - left, bottom - top
    x, y = max(0, (box["x"] - left) / width), max(0, (box["y"] - top) / height)
    x_end = min(1, (box["x"] + box["width"] - left) / width)
    y_end = min(1, (box["y"] + box["height"] - top) / height)
    return (y, x, y_end, x_end) if x < x_end and y < y_end else None


def filled_boxes(shares: np.ndarray, rng: random.Random, tries: int) -> dict[int, list[Box]]:
    """
    Random boxes of 2 to 10 patches a side of which one category fills at least 65 %, by category.

    Args:
        shares: see [`patch_shares`]; tries: boxes drawn.
    """
    _, height, width = shares.shape
    sums = _sums(shares)
    found: dict[int, list[Box]] = {}
    for _ in range(tries):
        h, w = rng.randint(2, min(10, height)), rng.randint(2, min(10, width))
        top, left = rng.randint(0, height - h), rng.randint(0, width - w)
        inside = _inside(sums, top, left, h, w)
        largest = int(inside.argmax())
        if inside[largest] >= 0.65:
            box = (top / height, left / width, (top + h) / height, (left + w) / width)
            found.setdefault(largest, []).append(box)
    return found


def thin_boxes(shares: np.ndarray, rng: random.Random, categories: Sequence[int]) -> dict[int, list[Box]]:
    """
    Boxes of 1 to 3 patches a side of which a thin category covers at least [`THIN_SHARE`], by category, at most 8.

    Args:
        shares: see [`patch_shares`]; categories: the thin ones.
    """
    _, height, width = shares.shape
    sums = _sums(shares)
    found: dict[int, list[Box]] = {}
    for category in categories:
        places = np.argwhere(shares[category] >= 0.25).tolist()
        for top, left in rng.sample(places, min(30, len(places))):
            h, w = rng.randint(1, min(3, height - top)), rng.randint(1, min(3, width - left))
            if _inside(sums, top, left, h, w)[category] >= THIN_SHARE:
                box = (top / height, left / width, (top + h) / height, (left + w) / width)
                found.setdefault(category, []).append(box)
    return {category: boxes[:8] for category, boxes in found.items()}


def _sums(shares: np.ndarray) -> np.ndarray:
    """Sums over all patches above and to the left, (categories, height + 1, width + 1)."""
    return np.pad(shares.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))


def _inside(sums: np.ndarray, top: int, left: int, h: int, w: int) -> np.ndarray:
    """The share of each category in a box of h x w patches."""
    bottom, right = top + h, left + w
    return (sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]) / (h * w)


def patch_shares(labels: np.ndarray, categories: int, height: int, width: int) -> np.ndarray:
    """The share of each category in each patch, (categories, height, width), of 4 x 4 pixels per patch."""
    rows = np.arange(height * 4) * labels.shape[0] // (height * 4)
    columns = np.arange(width * 4) * labels.shape[1] // (width * 4)
    pixels = labels[rows][:, columns]
    one_hot = pixels == np.arange(categories)[:, None, None]
    return one_hot.reshape(categories, height, 4, width, 4).mean((2, 4))
