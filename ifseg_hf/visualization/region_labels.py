"""Words written onto their regions of an image, where a region has room for its word."""

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SAMPLES = 256  # pixels along a side of the mask in which a place for a word is sought


def label_positions(categories: np.ndarray, boxes: Mapping[int, tuple[int, int]]) -> dict[int, tuple[float, float]]:
    """
    Returns for each category the centre (x, y) of the largest box of given proportions that lies within its regions.

    The distance of the centre from the region's border, in units of the box, is thus the largest there is.

    Args:
        categories: integers (H, W).
        boxes: width and height of the smallest box of each category. A category without room for it is left out.
    """
    height, width = categories.shape
    step = max(1, math.ceil(max(height, width) / _SAMPLES))
    sampled = categories[step // 2 :: step, step // 2 :: step]
    positions = {}
    for category, (box_width, box_height) in boxes.items():
        # One sample more than fits the box exactly, since the border of a region lies between two samples.
        smallest = tuple(math.ceil(side / step) + (step > 1) for side in (box_width, box_height))
        centre = _largest_box(sampled == category, *smallest)
        if centre is not None:
            positions[category] = (centre[0] * step, centre[1] * step)
    return positions


def _largest_box(region: np.ndarray, width: int, height: int) -> tuple[float, float] | None:
    """Centre of the largest box of the proportions `width` to `height` in a bool region; None if none is so large."""
    sums = np.zeros(np.add(region.shape, 1), np.int64)
    sums[1:, 1:] = region.cumsum(0).cumsum(1)

    def places(scale: float) -> tuple[np.ndarray, int, int]:
        """Upper left corners (n, 2), as y and x, of the boxes of a scale within the region, and width and height."""
        w, h = math.ceil(scale * width), math.ceil(scale * height)
        if h > region.shape[0] or w > region.shape[1]:
            return np.empty((0, 2)), w, h
        inside = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
        return np.argwhere(inside == w * h), w, h

    if sums[-1, -1] < width * height or not len(places(1)[0]):
        return None
    low, high = 1.0, 1 + max(region.shape) / min(width, height)
    while (high - low) * max(width, height) > 0.5:
        middle = (low + high) / 2
        low, high = (middle, high) if len(places(middle)[0]) else (low, middle)
    corners, w, h = places(low)
    y, x = corners[((corners - corners.mean(0)) ** 2).sum(1).argmin()]
    return x + w / 2, y + h / 2


def draw_labels(
    image: Image.Image, categories: np.ndarray, texts: Mapping[int, str], font: ImageFont.FreeTypeFont
) -> None:
    """Writes the text of each category onto the image, white with a dark outline, where a region has room for it.

    Args:
        image: RGB, changed in place. categories: integers (H, W) of its size. texts: by category.
    """
    stroke = max(1, round(font.size / 9))
    extents = {i: font.getbbox(text, anchor="mm", stroke_width=stroke) for i, text in texts.items() if text.strip()}
    boxes = {i: (math.ceil(r - x) + stroke, math.ceil(b - y) + stroke) for i, (x, y, r, b) in extents.items()}
    # Text that would hide much of a small image is left to the legend.
    boxes = {i: (w, h) for i, (w, h) in boxes.items() if w <= image.width / 2 and h <= image.height / 8}
    draw = ImageDraw.Draw(image)
    for i, (x, y) in label_positions(categories, boxes).items():
        left, top, right, bottom = extents[i]
        place = (x - (left + right) / 2, y - (top + bottom) / 2)
        draw.text(place, texts[i], (255, 255, 255), font, "mm", stroke_width=stroke, stroke_fill=(20, 20, 20))


__all__ = ["draw_labels", "label_positions"]
