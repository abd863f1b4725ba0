"""Visualisation of segmentations: overlays with a legend, mask files with a palette, images side by side."""

import json
import math
from collections.abc import Sequence
from os import PathLike

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from ifseg_hf.processing.image_reading_ifseg import to_array
from ifseg_hf.visualization.colors import word_colors
from ifseg_hf.visualization.fonts import choose_font
from ifseg_hf.visualization.region_labels import draw_labels

_BACKGROUND, _TEXT, _GREY = (255, 255, 255), (30, 30, 30), (110, 110, 110)
_BLOCK = 2**18  # pixels that are painted at a time, since floats take several times the memory of the image


def _category_map(mask, names: Sequence[str]) -> np.ndarray:
    """`mask` (H, W), an array or a tensor, as int32 array in which every value that is no index into `names` is -1."""
    values = np.asarray(mask)
    if values.ndim != 2:
        raise ValueError(f"A mask has two dimensions (height, width), but this one has the shape {values.shape}.")
    categories = np.full(values.shape, -1, np.int32)
    np.copyto(categories, values, where=(values >= 0) & (values < len(names)), casting="unsafe")
    return categories


def label_map(segments: Sequence[dict], size: tuple[int, int], names: Sequence[str]) -> np.ndarray:
    """Returns the segments of the image segmentation pipeline as one map (H, W) of indices into `names`.

    `size` is the image's (width, height), as in Pillow. Pixels outside of all segments are -1.
    """
    mask = np.full(size[::-1], -1)
    for segment in segments:
        mask[np.asarray(segment["mask"]) > 0] = names.index(segment["label"])
    return mask


def shares(mask, names: Sequence[str]) -> dict[str, float]:
    """Returns the share of all pixels, from 0 to 1, of each category that occurs in `mask` (H, W), largest first."""
    categories = _category_map(mask, names)
    counts = np.zeros(len(names), np.int64)
    for block in np.split(categories.ravel(), range(_BLOCK, categories.size, _BLOCK)):
        counts += np.bincount(block[block >= 0], minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    return {names[i]: float(counts[i] / categories.size) for i in order if counts[i]}


def save_mask(mask, path: str | PathLike, names: Sequence[str]) -> None:
    """Writes `mask` (H, W) as a palette PNG whose pixel values are indices into `names`, in the colours of the names.

    Pixels without a category (negative or beyond the names) have the value 255. With more than 255 names the PNG is
    16-bit grey, and the value 65535. The text chunk "categories" of the PNG has the names, as a JSON list.
    """
    categories = _category_map(mask, names)
    if len(names) <= 255:
        image = Image.fromarray(categories.astype(np.uint8))  # -1 becomes 255
        colors = [*word_colors(names), *[(0, 0, 0)] * (256 - len(names))]
        image.putpalette([channel for color in colors for channel in color])
    else:
        image = Image.fromarray(categories.astype(np.uint16))
    text = PngInfo()
    text.add_itxt("categories", json.dumps(list(names), ensure_ascii=False))
    image.save(path, format="PNG", pnginfo=text)


def overlay(
    image: Image.Image,
    mask,
    names: Sequence[str],
    alpha: float = 0.55,
    legend: bool = True,
    font: str | PathLike | None = None,
    labels: bool = True,
    font_size: int | None = None,
) -> Image.Image:
    """Returns the image with each category in its colour, names on large regions, and a legend beside or below it.

    Args:
        image: of any mode; it is turned upright by its EXIF orientation, as the model sees it.
        mask: (H, W) of the image's size, indices into `names`. Pixels without a category keep their colours.
        names: the categories; each has the colour that [`word_colors`] gives its name. The legend shows the categories
            in the mask.
        alpha: opacity of the colours, from 0 to 1.
        legend: whether to add a legend. Without it the result has the image's size.
        font: file of a font for labels and legend; see [`choose_font`].
        labels: whether to write each name onto the largest of its regions that has room for it.
        font_size: of the labels, in pixels. Default: proportional to the image.

    Raises:
        `ValueError`: the sizes of image and mask differ, or the font cannot be read.
    """
    categories = _category_map(mask, names)
    painted = to_array(image)
    height, width = painted.shape[:2]
    if categories.shape != (height, width):
        raise ValueError(
            f"The mask is {categories.shape[1]}x{categories.shape[0]} pixels and the image {width}x{height}: make the "
            "mask in the image's size (target_sizes)."
        )
    edge = max(1, round(_font_size(image) / 14))
    colors = np.asarray([*word_colors(names), (0, 0, 0)], dtype=np.float32)  # the last row is category -1
    rows = max(1, _BLOCK // width)
    for start in range(0, height, rows):
        block = slice(start, start + rows)
        own = categories[block]
        known = own >= 0
        painted[block][known] = _painted(painted[block][known], colors[own[known]], alpha)
        edges = _boundaries(categories[start : start + rows + edge], edge)
        painted[block][edges[: len(own)]] = 255
    result = Image.fromarray(painted)
    present = shares(categories, names) if labels or legend else {}
    if labels:
        shown = _shortened(list(present))
        typeface, drawable = choose_font(shown.values(), font_size or _font_size(image), font)
        draw_labels(result, categories, {names.index(name): drawable[text] for name, text in shown.items()}, typeface)
    if not legend:
        return result
    del painted, categories  # of a large image, before the canvas with the legend is made
    return _with_legend(result, present, names, font)


def _painted(pixels: np.ndarray, colors: np.ndarray, alpha: float) -> np.ndarray:
    """The pixels (n, 3), uint8 or float, below their colours (n, 3), as uint8."""
    # Less saturation and no dark tones, so that the categories' colours stand out.
    pixels = pixels.astype(np.float32)
    muted = 40 + 0.8 * (pixels + pixels.mean(axis=-1, keepdims=True)) / 2
    return ((1 - alpha) * muted + alpha * colors).round().astype(np.uint8)


def _boundaries(categories: np.ndarray, width: int) -> np.ndarray:
    """Bool (H, W): whether a pixel up to `width` to the right or below has another category."""
    edges = np.zeros(categories.shape, dtype=bool)
    for step in range(1, width + 1):
        edges[:, :-step] |= categories[:, :-step] != categories[:, step:]
        edges[:-step] |= categories[:-step] != categories[step:]
    return edges


def _font_size(image: Image.Image) -> int:
    """Font size for text beside `image`: proportional to its side, and at least 14."""
    return max(14, round(math.sqrt(image.width * image.height) / 32))


def _with_legend(
    image: Image.Image, present: dict[str, float], names: Sequence[str], font_file: str | PathLike | None
) -> Image.Image:
    """Adds swatch, name and share of each of the `present` categories, below a wide image or right of a tall one."""
    size = _font_size(image)
    shown = _shortened(list(present))
    shares = {name: _percent(share) for name, share in present.items()}
    font, drawable = choose_font([*shown.values(), *shares.values()], size, font_file)
    line, swatch, gap = round(1.6 * size), round(1.1 * size), round(0.6 * size)
    texts = {name: (drawable[shown[name]], drawable[shares[name]]) for name in present}
    # Columns of equal width: swatch, name, share aligned at the right.
    name_width = max((math.ceil(font.getlength(name)) for name, _ in texts.values()), default=0)
    share_width = max((math.ceil(font.getlength(share)) for _, share in texts.values()), default=0)
    column = swatch + gap * 2 // 3 + name_width + gap + share_width
    below = image.width > image.height
    if below:
        columns = max(1, min(len(texts), (image.width - gap) // (column + 2 * gap)))
        rows = math.ceil(len(texts) / columns)
    else:
        rows = max(4, (image.height - gap) // line)
        columns = math.ceil(len(texts) / rows)
        rows = math.ceil(len(texts) / max(1, columns))
    width, height = 2 * gap + columns * column + max(0, columns - 1) * 2 * gap, rows * line + gap
    if below:
        canvas = Image.new("RGB", (max(image.width, width), image.height + height), _BACKGROUND)
        left, top = gap, image.height + gap // 2
    else:
        canvas = Image.new("RGB", (image.width + width, max(image.height, height)), _BACKGROUND)
        left, top = image.width + gap, gap // 2
    canvas.paste(image)
    draw = ImageDraw.Draw(canvas)
    color_of = dict(zip(names, word_colors(names), strict=True))
    for i, (name, (text, share)) in enumerate(texts.items()):
        # Along the rows below an image, down the columns beside it.
        row, col = divmod(i, columns) if below else (i % rows, i // rows)
        x, y = left + col * (column + 2 * gap), top + row * line
        middle = y + line / 2
        box = (x, middle - swatch / 2, x + swatch, middle + swatch / 2)
        draw.rounded_rectangle(box, radius=swatch // 5, fill=color_of[name], outline=_GREY)
        draw.text((x + swatch + gap * 2 // 3, middle), text, fill=_TEXT, font=font, anchor="lm")
        draw.text((x + column, middle), share, fill=_GREY, font=font, anchor="rm")
    return canvas


def _shortened(names: Sequence[str], limit: int = 40) -> dict[str, str]:
    """The names, cut to `limit` characters with an ellipsis; where two would be equal, with a number, too."""
    shown: dict[str, str] = {}
    for name in names:
        text, number = name if len(name) <= limit else name[: limit - 1] + "…", 2
        while text in shown.values():
            end = f"… ({number})"
            text, number = name[: limit - len(end)] + end, number + 1
        shown[name] = text
    return shown


def _percent(share: float) -> str:
    """The share as text, such as "12 %"."""
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


def side_by_side(
    images: Sequence[Image.Image], titles: Sequence[str], font: str | PathLike | None = None
) -> Image.Image:
    """Returns the images in a row with their tops aligned, each below its title.

    Args:
        images: of any mode.
        titles: one for each image.
        font: file of a font for the titles; see [`choose_font`].

    Raises:
        `ValueError`: there is no image, or not one title for each; or the font cannot be read.
    """
    if not images or len(images) != len(titles):
        raise ValueError(
            f"side_by_side needs one title for each image: got {len(images)} images and {len(titles)} titles."
        )
    images = [Image.fromarray(to_array(image)) for image in images]
    size = round(1.2 * max(_font_size(image) for image in images))
    typeface, drawable = choose_font(titles, size, font)
    titles = [drawable[title] for title in titles]
    head, gap = 2 * size, size
    widths = [
        max(image.width, math.ceil(typeface.getlength(title))) for image, title in zip(images, titles, strict=True)
    ]
    sheet_size = (sum(widths) + gap * (len(images) + 1), head + max(image.height for image in images) + gap)
    sheet = Image.new("RGB", sheet_size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    left = gap
    for image, title, width in zip(images, titles, widths, strict=True):
        draw.text((left, head / 2), title, fill=_TEXT, font=typeface, anchor="lm")
        sheet.paste(image, (left, head))
        left += width + gap
    return sheet


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Returns the images below each other on white, with their left edges aligned."""
    sheet = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), _BACKGROUND)
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


__all__ = ["label_map", "overlay", "save_mask", "shares", "side_by_side", "stacked"]
