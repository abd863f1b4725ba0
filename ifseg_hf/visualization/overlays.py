"""Segmentations as pictures: label maps, palette masks, overlays with a legend, sheets of several pictures."""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from os import PathLike

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

Color = tuple[int, ...]  # red, green, blue, 0 to 255

# The first colours are chosen by hand: far apart for most kinds of colour vision, and readable over a photo.
_FIRST_COLORS = ("#e6194b", "#1f9e46", "#4363d8", "#ffd21f", "#f58231", "#35c9ea", "#a029c9", "#f48fc4")
_PAPER, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (110, 110, 110)


@lru_cache
def palette(count: int) -> tuple[Color, ...]:
    """Returns `count` colours, each as unlike the ones before it as can be.

    A longer palette begins with the shorter one. No colour is close to black or white. Past 1000 they repeat.
    """
    colors = [tuple(bytes.fromhex(color[1:])) for color in _FIRST_COLORS[:count]]
    levels = np.linspace(0, 255, 18)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    brightness = candidates @ (0.299, 0.587, 0.114)
    candidates = candidates[(brightness > 50) & (brightness < 225)]
    distance = np.full(len(candidates), np.inf)
    for i in range(min(count, 1000)):
        if i == len(colors):
            colors.append(tuple(int(level) for level in candidates[distance.argmax()]))
        distance = np.minimum(distance, _color_distance(candidates, colors[i]))
    return tuple(colors[i % 1000] for i in range(count))


def _color_distance(colors: np.ndarray, color: Color) -> np.ndarray:
    """(n, 3) and one colour -> (n,): squared distance, each channel weighted by what the eye sees of it ("redmean")."""
    difference = (colors - color) ** 2
    red = (colors[:, 0] + color[0]) / 2
    return (2 + red / 256) * difference[:, 0] + 4 * difference[:, 1] + (2 + (255 - red) / 256) * difference[:, 2]


def _category_map(mask, names: Sequence[str]) -> np.ndarray:
    """Any (H, W) array or tensor of categories -> int64 array in which everything that is no category is -1."""
    categories = np.asarray(mask)
    if categories.ndim != 2:
        raise ValueError(f"A mask has two dimensions (height, width); this one has the shape {categories.shape}.")
    categories = categories.astype(np.int64)
    return np.where((categories >= 0) & (categories < len(names)), categories, -1)


def label_map(segments: Sequence[dict], size: tuple[int, int], names: Sequence[str]) -> np.ndarray:
    """What the image segmentation pipeline returns as one (H, W) map of indices into `names`; -1 where none applies.

    `size` is the photo's, (width, height) as PIL has it.
    """
    mask = np.full(size[::-1], -1)
    for segment in segments:
        mask[np.asarray(segment["mask"]) > 0] = names.index(segment["label"])
    return mask


def shares(mask, names: Sequence[str]) -> dict[str, float]:
    """Returns the share of the pixels of each category that occurs in `mask` (H, W), the largest first."""
    categories = _category_map(mask, names)
    counts = np.bincount(categories[categories >= 0], minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    return {names[i]: float(counts[i] / categories.size) for i in order if counts[i]}


def save_mask(mask, path: str | PathLike, names: Sequence[str]) -> None:
    """Writes `mask` (H, W) as a PNG whose pixel values are indices into `names`, with a colour for each.

    The largest value (255; 65535 in the 16-bit grey PNG that more than 255 names need) stands for pixels without a
    category: negative or beyond the names. The names are in the PNG's text chunk "categories", as a JSON list.
    """
    categories = _category_map(mask, names)
    if len(names) <= 255:
        image = Image.fromarray(np.where(categories < 0, 255, categories).astype(np.uint8)).convert("P")
        colors = [*palette(len(names)), *[(0, 0, 0)] * (256 - len(names))]
        image.putpalette([channel for color in colors for channel in color])
    else:
        image = Image.fromarray(np.where(categories < 0, 65535, categories).astype(np.uint16))
    text = PngInfo()
    text.add_itxt("categories", json.dumps(list(names), ensure_ascii=False))
    image.save(path, format="PNG", pnginfo=text)


def overlay(photo: Image.Image, mask, names: Sequence[str], alpha: float = 0.55, legend: bool = True) -> Image.Image:
    """Returns the photo with every category in its colour, and beside or below it which colour is which.

    `mask` (H, W), of the photo's size, holds indices into `names`; pixels without a category keep the photo.
    Raises `ValueError` if the sizes differ.
    """
    categories = _category_map(mask, names)
    if categories.shape != (photo.height, photo.width):
        raise ValueError(
            f"The mask is {categories.shape[1]}x{categories.shape[0]} pixels and the photo {photo.width}x"
            f"{photo.height}: make the mask for the photo's own size (target_sizes)."
        )
    pixels = np.asarray(photo.convert("RGB"), dtype=np.float32)
    # Half of the photo's own colours go, and its darkest tones, so that those of the categories can be told over them.
    muted = 40 + 0.8 * (pixels + pixels.mean(axis=-1, keepdims=True)) / 2
    colors = np.asarray([*palette(len(names)), (0, 0, 0)], dtype=np.float32)  # the last row is category -1
    painted = (1 - alpha) * muted + alpha * colors[categories]
    painted = np.where((categories < 0)[..., None], pixels, painted)
    painted[_boundaries(categories, max(1, round(_unit(photo) / 14)))] = 255
    picture = Image.fromarray(painted.round().astype(np.uint8))
    return _with_legend(picture, shares(categories, names), names) if legend else picture


def _boundaries(categories: np.ndarray, width: int) -> np.ndarray:
    """(H, W) -> bool (H, W): pixels whose category differs from that of a pixel up to `width` to the right or below."""
    edges = np.zeros(categories.shape, dtype=bool)
    for step in range(1, width + 1):
        edges[:, :-step] |= categories[:, :-step] != categories[:, step:]
        edges[:-step] |= categories[:-step] != categories[step:]
    return edges


def _unit(image: Image.Image) -> int:
    """Font size for text beside `image`: grows with it, and stays readable beside a thumbnail."""
    return max(14, round(math.sqrt(image.width * image.height) / 32))


def _with_legend(picture: Image.Image, present: dict[str, float], names: Sequence[str]) -> Image.Image:
    """Puts swatch, name and share of each of the `present` categories below a wide picture, right of any other."""
    size = _unit(picture)
    font = ImageFont.load_default(size)
    line, swatch, gap = round(1.6 * size), round(1.1 * size), round(0.6 * size)
    texts = {name: (_shortened(name), _percent(share)) for name, share in present.items()}
    # Columns of equal width: swatch, name, share set flush right.
    name_width = max((math.ceil(font.getlength(name)) for name, _ in texts.values()), default=0)
    share_width = max((math.ceil(font.getlength(share)) for _, share in texts.values()), default=0)
    column = swatch + gap * 2 // 3 + name_width + gap + share_width
    below = picture.width > picture.height
    if below:
        columns = max(1, min(len(texts), (picture.width - gap) // (column + 2 * gap)))
        rows = math.ceil(len(texts) / columns)
    else:
        rows = max(4, (picture.height - gap) // line)
        columns = math.ceil(len(texts) / rows)
        rows = math.ceil(len(texts) / max(1, columns))
    width, height = 2 * gap + columns * column + max(0, columns - 1) * 2 * gap, rows * line + gap
    if below:
        canvas = Image.new("RGB", (max(picture.width, width), picture.height + height), _PAPER)
        left, top = gap, picture.height + gap // 2
    else:
        canvas = Image.new("RGB", (picture.width + width, max(picture.height, height)), _PAPER)
        left, top = picture.width + gap, gap // 2
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    color_of = dict(zip(names, palette(len(names)), strict=True))
    for i, (name, (text, share)) in enumerate(texts.items()):
        # Reading order: along the rows below a picture, down the columns beside it.
        row, col = divmod(i, columns) if below else (i % rows, i // rows)
        x, y = left + col * (column + 2 * gap), top + row * line
        middle = y + line / 2
        box = (x, middle - swatch / 2, x + swatch, middle + swatch / 2)
        draw.rounded_rectangle(box, radius=swatch // 5, fill=color_of[name], outline=_FAINT)
        draw.text((x + swatch + gap * 2 // 3, middle), text, fill=_INK, font=font, anchor="lm")
        draw.text((x + column, middle), share, fill=_FAINT, font=font, anchor="rm")
    return canvas


def _shortened(name: str, limit: int = 40) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


def side_by_side(images: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Returns the images in a row, each under its title, their tops aligned. Raises `ValueError` without images."""
    if not images or len(images) != len(titles):
        raise ValueError(f"side_by_side takes a title for each image: got {len(images)} and {len(titles)}.")
    size = round(1.2 * max(_unit(image) for image in images))
    font = ImageFont.load_default(size)
    head, gap = 2 * size, size
    widths = [max(image.width, math.ceil(font.getlength(title))) for image, title in zip(images, titles, strict=True)]
    sheet_size = (sum(widths) + gap * (len(images) + 1), head + max(image.height for image in images) + gap)
    sheet = Image.new("RGB", sheet_size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    left = gap
    for image, title, width in zip(images, titles, widths, strict=True):
        draw.text((left, head / 2), title, fill=_INK, font=font, anchor="lm")
        sheet.paste(image, (left, head))
        left += width + gap
    return sheet
