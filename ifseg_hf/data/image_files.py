"""Image files in a folder and its sub-folders, and their masks by name.

This module imports neither torch nor transformers, so that scripts report wrong arguments at once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

IMAGE_ENDINGS = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SPLIT_FILES = ("train", "training", "val", "validation", "test")
"""Names of the splits that may be files of names beside the images, such as `val.txt`."""
MASK_ENDINGS = (".bmp", ".png", ".tif", ".tiff")
OnErrorChoice = Literal["fail", "skip"]
ON_ERROR = get_args(OnErrorChoice)
"""What may happen to an image that cannot be read."""

# Suffixes of Cityscapes file names: of images, and of masks with one integer label per pixel. `_OTHER_MASKS` are files
# with the same labels as colours, and with instances.
_PAIRED = ("_leftImg8bit", "_gtFine_labelIds", "_gtCoarse_labelIds", "_gtFine_labelTrainIds", "_gtCoarse_labelTrainIds")
_OTHER_MASKS = ("_color", "_instanceIds", "_instanceTrainIds")
_CITYSCAPES = ("_gtFine", "_gtCoarse")


class SampleError(ValueError):
    """An image or a mask that cannot be used. The message is one line and names the file."""


def list_images(folder: str | os.PathLike, endings: Sequence[str] = IMAGE_ENDINGS) -> dict[str, str]:
    """
    Returns the paths of the images in a folder and its sub-folders, by their names, in the order of the names.

    A name is the path from the folder, with "/" between its parts, without the ending and without what follows the
    common name of an image and its mask in Cityscapes: "aachen/aachen_000000_000019" for the image
    "aachen/aachen_000000_000019_leftImg8bit.png" and its mask "aachen/aachen_000000_000019_gtFine_labelIds.png". Files
    and folders whose names begin with a dot, as macOS makes them beside images, are no images.

    Args:
        folder: the folder to search.
        endings: in lower case, with the dot.

    Raises:
        `ValueError`: the folder cannot be read, or two images have one name.
    """
    folder = Path(folder)
    files: dict[str, str] = {}

    def fail(error: OSError):
        raise ValueError(f"The folder {error.filename} can't be read: {error.strerror}.") from None

    for path, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(names):
            stem, ending = os.path.splitext(file)
            if ending.lower() not in endings or file.startswith(".") or _is_other_mask(stem):
                continue
            found = os.path.join(path, file)
            name = Path(path).relative_to(folder).joinpath(_common_name(stem)).as_posix()
            if name in files:
                first, second = (Path(one).relative_to(folder).as_posix() for one in (files[name], found))
                raise ValueError(f"{folder} has two images called {name}: {first} and {second}.")
            files[name] = found
    return dict(sorted(files.items()))


def read_names(file: Path) -> list[str]:
    """
    Returns the names of the images that a split file lists, in order; see [`list_images`].

    It has one name a line, with or without an ending.

    Raises:
        `ValueError`: the file cannot be read, lists nothing, or lists a name twice.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} can't be read: {error}") from None
    names: dict[str, None] = {}
    for line in filter(str.strip, lines):
        stem, ending = os.path.splitext(line.strip())
        name = _common_name(stem if ending.lower() in IMAGE_ENDINGS else line.strip())
        if name in names:
            raise ValueError(f"{file} lists {name} twice.")
        names[name] = None
    if not names:
        raise ValueError(f"{file} lists no image: write one name a line.")
    return list(names)


def check_on_error(on_error: str) -> None:
    """Raises `ValueError` for what is not one of [`ON_ERROR`]."""
    if on_error not in ON_ERROR:
        raise ValueError(f'on_error="{on_error}": choose {" or ".join(ON_ERROR)}.')


def _common_name(stem: str) -> str:
    """The name that an image and its mask have in common."""
    return next((stem.removesuffix(end) for end in _PAIRED if stem.endswith(end) and stem != end), stem)


def _is_other_mask(stem: str) -> bool:
    """Whether a file of Cityscapes shows labels in another way than as one integer a pixel."""
    return any(stem.endswith(kind + other) for kind in _CITYSCAPES for other in _OTHER_MASKS)


__all__ = [
    "IMAGE_ENDINGS",
    "MASK_ENDINGS",
    "ON_ERROR",
    "SPLIT_FILES",
    "OnErrorChoice",
    "SampleError",
    "check_on_error",
    "list_images",
    "read_names",
]
