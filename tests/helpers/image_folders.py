"""A folder of small images with masks, in which the colour shows the category, for training in tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_model import save_tiny_model

from ifseg_hf.processing import IFSegProcessor

NAMES = ["cat", "cup", "sky", "sea"]
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]], np.uint8)
IGNORE = 9


def save_tiny_segmenter(folder: Path) -> str:
    """Saves the model of tiny_model.py with an image size of 48 pixels, and returns the folder's name."""
    save_tiny_model(folder, tuned=True)
    processor = IFSegProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 48, "longest_edge": 192}
    processor.save_pretrained(folder)
    return str(folder)


def random_mask(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blocks of categories, and some pixels without a label."""
    cells = random.integers(0, len(NAMES), (3, 4))
    mask = cells[np.arange(height)[:, None] * 3 // height, np.arange(width) * 4 // width].astype(np.uint8)
    mask[: height // 8] = IGNORE
    return mask


def save_masked_images(folder: Path, count: int = 6, split: str | None = "train", height: int = 48, width: int = 60):
    """Saves images as PNG, so that their colours are exact; ignored pixels are black. Returns the folder's name."""
    random = np.random.default_rng(0)
    part = folder / split if split else folder
    for name in ("images", "masks"):
        (part / name).mkdir(parents=True)
    for number in range(count):
        mask = random_mask(random, height + number, width)
        image = np.where((mask == IGNORE)[..., None], 0, COLOURS[np.minimum(mask, len(NAMES) - 1)]).astype(np.uint8)
        Image.fromarray(image).save(part / "images" / f"{number}.png")
        Image.fromarray(mask).save(part / "masks" / f"{number}.png")
    (folder / "dataset.json").write_text(json.dumps({"categories": NAMES, "ignore_index": IGNORE}))
    return str(folder)
