"""Prompts, images, segmentation and post-processing, imported as `ifseg_hf.processing`.

Checkpoints carry copies of these files, which import nothing else of the project.
"""

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
from .prompt_ifseg import PROMPT_TEMPLATE
from .segmenter_ifseg import IFSegSegmenter
from .sliding_window_ifseg import sliding_window_outputs
from .text_ifseg import normalize_text
from .tokenization_ofa import OFATokenizer

__all__ = [
    "PROMPT_TEMPLATE",
    "IFSegImageProcessor",
    "IFSegImageSegmentationPipeline",
    "IFSegProcessor",
    "IFSegSegmenter",
    "OFATokenizer",
    "nearest_patches",
    "normalize_text",
    "patch_scores",
    "resize_scores",
    "resized_argmax",
    "segmentation_maps",
    "sliding_window_outputs",
    "smooth_probabilities",
]
