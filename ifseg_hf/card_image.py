"""The picture of a model card: an image that the user names, beside its segmentation by the model."""

from pathlib import Path

import numpy as np
from PIL import Image

from ifseg_hf.evaluation.segmenter import load_segmenter
from ifseg_hf.hub.model_folder import CARD_IMAGE
from ifseg_hf.processing.image_reading_ifseg import read_image, to_array
from ifseg_hf.visualization.overlays import overlay, side_by_side

__all__ = ["draw_card_image", "read_card_image"]

_SIDE = 640  # the longer side of the image in the picture


def read_card_image(image: str | Path) -> Image.Image:
    """Returns an image as RGB, upright and with at most 640 pixels a side. Raises `ValueError` if it cannot be read."""
    if "://" not in str(image) and not Path(image).is_file():
        raise ValueError(f'There is no image "{image}" for the model card.')
    picture = Image.fromarray(to_array(read_image(image)))
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def draw_card_image(folder: str | Path, image: str | Path, trust_remote_code: bool = False) -> Path:
    """
    Writes the picture of a model card into the folder of a tuned model: an image beside its segmentation.

    `model_card` refers to it, and `push_to_hub` publishes it with the model. Only pixels are written: neither the name
    of the image nor its metadata, such as the place where a photo was taken.

    Args:
        folder: a tuned model with its processor and words.
        image: file or URL.
        trust_remote_code: run the code saved with the model, for a backbone that this package does not have.

    Returns:
        The picture, `card_image.jpg` in the folder.

    Raises:
        `ValueError`: the image or the model cannot be read, or the model was not tuned for any words.
    """
    folder, picture = Path(folder), read_card_image(image)
    try:
        segmenter = load_segmenter(folder, trust_remote_code=trust_remote_code)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    if segmenter.model.config.category_ids is None:
        raise ValueError(f'"{folder}" was not tuned for any words, so its model card can have no picture.')
    (mask,) = segmenter.segment([np.asarray(picture)])
    segmented = overlay(picture, mask.cpu(), list(segmenter.model.config.id2label.values()))
    side_by_side([picture, segmented], ["image", "segmentation"]).save(folder / CARD_IMAGE, quality=88)
    return folder / CARD_IMAGE
