"""Masks as datasets have them: values with gaps, several ignored values, and colours that stand for categories."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ifseg_hf.data.vocabularies import read_categories
from ifseg_hf.processing.image_processing_ifseg import IGNORE_INDEX

UNKNOWN = -1  # label of a mask value that stands for no category
LARGEST_VALUE = 2**16 - 1  # of a grey PNG

_MODES_WITHOUT_COLORS = ("I", "F")  # the first letters of modes above 8 bits


@dataclass
class MaskMetadata:
    """What a `dataset.json` says about the masks of a folder.

    Attributes:
        names: the categories in order of their labels.
        labels: table of the labels of mask values; see [`label_table`].
        colors: codes of the colours that stand for the values 0, 1, ...; see [`mask_values`]. `None`: masks have the
            values themselves.
    """

    names: list[str]
    labels: np.ndarray
    colors: np.ndarray | None = None


def read_mask_metadata(
    metadata: Mapping[str, Any],
    categories: Sequence[str] | None = None,
    ignore_index: int | Sequence[int] | None = None,
) -> MaskMetadata:
    """Returns the categories and the table of labels from the contents of a `dataset.json`.

    Args:
        metadata: with `"categories"`, the names in order of the mask values, or `{"value": "name"}`; `"ignore_index"`,
            the value of unlabelled pixels or a list of such values; or with `"palette"`, `{"R,G,B": "name"}` or
            `{"#RRGGBB": "name"}`, where masks have colours: null marks unlabelled pixels, and `"categories"` may then
            give the order of the names.
        categories, ignore_index: the same, from the settings.

    Raises:
        `ValueError`: something is missing, wrong, or given twice.
    """
    categories = _only_one(categories, metadata.get("categories"), "categories")
    ignored = ignored_values(_only_one(ignore_index, metadata.get("ignore_index"), "ignore_index"))
    palette = metadata.get("palette")
    if palette is not None:
        if ignored:
            raise ValueError('has "palette" and "ignore_index": give the colours of unlabelled pixels the name null.')
        return _from_palette(palette, categories)
    if not isinstance(categories, (str, list, tuple, Mapping)):
        raise ValueError('has no list "categories": write one, or give the names of the mask values.')
    names = named_values(categories, ignored)
    return MaskMetadata(list(names.values()), label_table(names, ignored))


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON file, in which no key stands twice; `json` would drop the first. Raises `ValueError`."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'"{key}" stands twice.')
        found[key] = value
    return found


def ignored_values(ignore_index: Any) -> list[int]:
    """The values of unlabelled pixels as a list. Raises `ValueError` unless they are integers."""
    values = list(ignore_index) if isinstance(ignore_index, (list, tuple)) else [ignore_index]
    values = [] if ignore_index is None else values
    if any(not isinstance(value, int) or isinstance(value, bool) or value > LARGEST_VALUE for value in values):
        raise ValueError(
            f"has ignore_index={ignore_index!r}, which should hold an integer, or a list of integers, up to "
            f"{LARGEST_VALUE}."
        )
    return values


def named_values(categories: Sequence[str] | Mapping, ignored: Sequence[int] = ()) -> dict[int, str]:
    """The names of the mask values: in order from 0 without those `ignored`, or as a mapping has them by value."""
    if isinstance(categories, Mapping):
        try:
            names = {int(value): name for value, name in categories.items()}
        except (ValueError, TypeError):
            raise ValueError('has "categories" that should be a list of names, or {"mask value": "name"}.') from None
        if len(names) < len(categories):
            raise ValueError(f"names a mask value twice among {', '.join(map(str, categories))}.")
        for value in names:
            if not 0 <= value <= LARGEST_VALUE:
                kind = "negative mask value" if value < 0 else "mask value"
                raise ValueError(f"names the {kind} {value}: values are from 0 to {LARGEST_VALUE}.")
        names = {value: names[value] for value in sorted(names) if value not in ignored}
    else:
        listed = list(read_categories(categories))
        values = (value for value in range(len(listed) + len(ignored)) if value not in ignored)
        names = dict(zip(values, listed, strict=False))
    return dict(zip(names, read_categories(list(names.values())), strict=True))


def label_table(values: Sequence[int] | Mapping[int, str], ignored: Sequence[int] = ()) -> np.ndarray:
    """A table with labels 0, 1, ... of the mask values `values`, -100 of those `ignored` and -1 of all others."""
    values = list(values)
    ignored = [value for value in ignored if value >= 0]
    labels = np.full(max([255, *ignored, *values]) + 1, UNKNOWN)
    labels[values] = np.arange(len(values))
    labels[ignored] = IGNORE_INDEX
    return labels


def _from_palette(palette: Any, order: Any) -> MaskMetadata:
    """Names, labels and colours from `{colour: name}`. Several colours may have one name."""
    if not isinstance(palette, Mapping) or not palette:
        raise ValueError('has a "palette" that should be {"R,G,B": "name"} or {"#RRGGBB": "name"}, null for no label.')
    codes: dict[int, Any] = {}
    for color, name in palette.items():
        code = _color_code(color)
        if code in codes:
            raise ValueError(f'has the colour {_color(code)} twice in "palette".')
        codes[code] = name
    for name in codes.values():
        if not isinstance(name, (str, type(None))):
            raise ValueError(f'has the name {name!r} in "palette": write it in quotes, or null for no label.')
    used = list(dict.fromkeys(name for name in codes.values() if name is not None))
    names = list(read_categories(used))
    if order is not None:
        if not isinstance(order, (list, tuple)) or sorted(map(str, order)) != sorted(map(str, used)):
            raise ValueError('has "palette" and "categories", which should list the same names, or be left out.')
        names, used = list(read_categories(list(order))), list(order)
    ordered = sorted(codes)
    labels = [IGNORE_INDEX if codes[code] is None else used.index(codes[code]) for code in ordered]
    return MaskMetadata(names, np.array(labels), np.array(ordered, np.int32))


def _color_code(color: str) -> int:
    """Red, green and blue in one number of 24 bits. Raises `ValueError`."""
    if re.fullmatch("#[0-9a-fA-F]{6}", color.strip()):
        return int(color.strip()[1:], 16)
    channels = re.fullmatch(r"[(\[]?\s*(\d{1,3})\s*[, ]\s*(\d{1,3})\s*[, ]\s*(\d{1,3})\s*[)\]]?", color.strip(), re.A)
    if channels is None or any(int(channel) > 255 for channel in channels.groups()):
        raise ValueError(f'has the colour "{color}" in "palette": write "128,64,128" or "#804080".')
    red, green, blue = map(int, channels.groups())
    return red << 16 | green << 8 | blue


def _color(code: int) -> str:
    """A colour as `"palette"` has it."""
    return f"{code >> 16},{code >> 8 & 255},{code & 255}"


def _only_one(given: Any, in_file: Any, what: str) -> Any:
    """The argument `given`, or the value in the file. Raises `ValueError` if both are set."""
    if given is not None and in_file is not None:
        raise ValueError(f"already has {what}: leave it out of the settings, or of the file.")
    return in_file if given is None else given


def mask_values(mask: Image.Image) -> np.ndarray:
    """The values of a mask's pixels, integers (H, W). Raises `ValueError` for a mask of colours."""
    values = np.asarray(mask)
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise ValueError(
            f"has mode {mask.mode}, but a mask has one integer per pixel (a grey or palette PNG): name its colours "
            'in dataset.json, as in "palette": {"128,64,128": "road"}, or convert them to integers.'
        )
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def mask_labels(mask: Image.Image, labels: np.ndarray, colors: np.ndarray | None = None) -> np.ndarray:
    """
    Returns the labels of a mask's pixels, int64 (H, W).

    Args:
        mask: with one integer per pixel, the index for a PNG with a palette; with `colors`, of any mode of 8 bits.
        labels: see [`label_table`]; the labels of the `colors`, if there are any.
        colors: increasing codes of colours, 65536 * red + 256 * green + blue.

    Raises:
        `ValueError`: the mask has another mode, or values or colours that stand for no category. The message lacks the
            mask's name, with which it should begin.
    """
    if colors is None:
        values = mask_values(mask)
        inside = (values >= 0) & (values < len(labels))
        found = np.where(inside, labels[np.where(inside, values, 0)], UNKNOWN)
    else:
        if mask.mode.startswith(_MODES_WITHOUT_COLORS):
            raise ValueError(f'has mode {mask.mode}, without colours, but dataset.json has a "palette" of colours.')
        red, green, blue = np.moveaxis(np.asarray(mask.convert("RGB")), -1, 0).astype(np.int32)
        values = red << 16 | green << 8 | blue
        positions = np.searchsorted(colors, values).clip(max=len(colors) - 1)
        found = np.where(colors[positions] == values, labels[positions], UNKNOWN)
    if (found == UNKNOWN).any():
        raise ValueError(_unknown_values(values[found == UNKNOWN], colors is not None))
    return found


def _unknown_values(values: np.ndarray, are_colors: bool) -> str:
    """A message about values that stand for no category: the first five, with their numbers of pixels."""
    unknown, counts = np.unique(values, return_counts=True)
    shown = [_color(int(value)) if are_colors else str(value) for value in unknown[:5]]
    listed = [f"{value} ({count} pixels)" for value, count in zip(shown, counts[:5], strict=True)]
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    if are_colors:
        what, do = (
            "colours",
            'Add them to "palette" in dataset.json, with the name null if they mark unlabelled pixels.',
        )
    else:
        what, do = "values", "If one of them marks unlabelled pixels, give it as ignore_index."
        if unknown[0] < 0 or unknown[-1] > LARGEST_VALUE:
            do = f"Values are from 0 to {LARGEST_VALUE}: convert the mask."
    return f"has {what} that stand for no category: {', '.join(listed)}{more}. {do}"


__all__ = [
    "LARGEST_VALUE",
    "UNKNOWN",
    "MaskMetadata",
    "ignored_values",
    "label_table",
    "mask_labels",
    "named_values",
    "read_mask_metadata",
    "unique_keys",
]
