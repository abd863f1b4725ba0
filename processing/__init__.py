"""Prompt, categories, pixels, post-processing: what a Hub checkpoint carries. Imported as `ifseg_hf.processing`."""

from .image_processing_ifseg import IFSegImageProcessor
from .pipeline_ifseg import IFSegImageSegmentationPipeline
from .post_processing_ifseg import (
    nearest_patches,
    patch_scores,
    resize_scores,
    resized_argmax,
    segmentation_maps,
    smooth_probabilities,
)
from .processing_ifseg import IFSegProcessor
from .sliding_window_ifseg import sliding_window_outputs

__all__ = [
    "IFSegImageProcessor",
    "IFSegImageSegmentationPipeline",
    "IFSegProcessor",
    "nearest_patches",
    "patch_scores",
    "resize_scores",
    "resized_argmax",
    "segmentation_maps",
    "sliding_window_outputs",
    "smooth_probabilities",
]
