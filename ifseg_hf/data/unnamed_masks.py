"""Images with masks that have no names: class-agnostic masks (Appendix A.2 and Table 8 of the paper)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ifseg_hf.data.masks import mask_values
from ifseg_hf.data.segmentation import SegmentationDataset, paired_samples
from ifseg_hf.processing.image_processing_ifseg import IGNORE_INDEX

__all__ = ["UnnamedMasks", "load_unnamed_masks"]


@dataclass
class UnnamedMasks(SegmentationDataset):
    """
    Images with id maps, in which the pixels of a mask have one number, and numbers mean nothing beyond their image.

    `read` returns the numbers (H, W), int64, in the place of labels; -100 for pixels that belong to no mask.

    Attributes:
        ignore_index (`int`, *optional*): the number of pixels that belong to no mask.
    """

    ignore_index: int | None = None

    def _to_labels(self, mask: Image.Image) -> np.ndarray:
        values = mask_values(mask).astype(np.int64)
        return values if self.ignore_index is None else np.where(values == self.ignore_index, IGNORE_INDEX, values)


def load_unnamed_masks(
    images: str | Path, masks: str | Path, names: list[str], ignore_index: int | None = None
) -> UnnamedMasks:
    """
    Returns the images of a folder with their id maps.

    Args:
        images (`str` or `Path`): folder of images, with its sub-folders.
        masks (`str` or `Path`): folder of id maps with the names of their images: grey or palette PNG, BMP or TIFF, 8
            or 16 bits. Masks of one image may not overlap. COCO-Stuff's and ADE20K's maps can be read in this way, too:
            one mask is then all pixels of a category.
        names (`list[str]`): the categories that masks may get.
        ignore_index (`int`, *optional*): the number of pixels that belong to no mask, such as 255.

    Raises:
        `ValueError`: a folder cannot be read, or no image has an id map.
    """
    samples = paired_samples(Path(images), Path(masks))
    return UnnamedMasks(samples, list(names), np.arange(len(names)), {}, ignore_index=ignore_index)
