"""The interface of the segmenters that can be evaluated, and the function that loads one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ifseg_hf.adapters import load_adapter, require_adapter, split_adapter
from ifseg_hf.evaluation.cosine import COSINE, CosineSegmenter
from ifseg_hf.loading import load_segmentation_model
from ifseg_hf.pretrained import resolve_model
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.processing.segmenter_ifseg import INFERENCE, IFSegSegmenter
from ifseg_hf.remote_code import import_backbone

__all__ = ["Segmenter", "load_segmenter"]


class Segmenter(Protocol):
    """A model that segments images into any words: [`IFSegSegmenter`], [`CosineSegmenter`], [`CLIPSegmenter`].

    Attributes:
        model (`torch.nn.Module`): its weights identify the evaluation when it is resumed.
        inference (`str`): "whole" images, or "slide" for overlapping square crops.
        smoothing (`tuple[int, int]`): neighbours and iterations of the smoothing that the model needs.
        background (`list[str]` or `None`): words that are merged into one label, "background".
    """

    model: Any
    inference: str

    @property
    def smoothing(self) -> tuple[int, int]: ...

    @property
    def background(self) -> list[str] | None: ...

    def set_words(self, categories: list[str] | dict[str, list[str]], *, background=None) -> None:
        """Sets the categories: names, or fine names by coarse category; `background` as in [`IFSegProcessor`]."""

    def preprocess(self, images: list[np.ndarray]) -> Mapping[str, torch.Tensor]:
        """Returns `pixel_values` and `pixel_mask` of RGB images, uint8 arrays (H, W, 3) of any sizes."""

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """Returns `logits`, `image_features` and `patch_mask` of the result of [`preprocess`]; see [`patch_scores`]."""


def load_segmenter(
    model: str | Path,
    baseline: str | None = None,
    device: str | torch.device = "cpu",
    inference: str | None = None,
    seed: int | None = 0,
    trust_remote_code: bool = False,
    untuned: bool = False,
    adapter: str | Path | None = None,
):
    """
    Loads a [`Segmenter`]: a model in evaluation mode, its processor and, if it was tuned, its words.

    Args:
        model: folder or Hub id; "ifseg-ofa-nano" is the embedded checkpoint. For an adapter, the model that it names
            is loaded with it.
        baseline: `None` for IFSeg, "cosine" for the similarity of IFSeg's patches and words without any tuning, "clip"
            or "maskclip" for [`load_baseline`].
        device: where the model computes, in float32.
        inference: "whole" images, or "slide" for overlapping square crops. By default as the model's processor says:
            crops if the model was trained on crops of images.
        seed: for the random segmentation positions of a converted OFA, which has none in its checkpoint. `None` does
            not seed the random number generator.
        trust_remote_code: run the code saved with the model, for a backbone that this package does not have.
        untuned: also segment with a model that was never tuned. Without it, such a model is refused when it gets words
            or images, except by a baseline, which needs no tuning.

    Raises:
        `ValueError` or `FileNotFoundError` for a model that cannot be loaded, and for wrong arguments.
    """
    if inference not in (None, *INFERENCE) or (baseline and inference == "slide"):
        raise ValueError(f'inference="{inference}": choose whole or slide; baselines segment whole images.')
    if baseline not in (None, COSINE):
        from ifseg_hf.evaluation.baselines import BASELINES, load_baseline  # takes long to import, and few need it

        if baseline not in BASELINES:
            raise ValueError(f'There is no baseline "{baseline}": choose from {", ".join((COSINE, *BASELINES))}.')
        return load_baseline(baseline, model, device)
    base, folder = split_adapter(model) if adapter is None else (model, require_adapter(adapter))
    path = resolve_model(base)
    try:
        import_backbone(path, trust_remote_code)
        processor = IFSegProcessor.from_pretrained(path)
        if seed is not None:
            torch.manual_seed(seed)
        loaded = load_segmentation_model(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'"{model}" is no IFSeg model that can be loaded: {" ".join(str(error).split())}'[:500]
        ) from error
    if folder is not None:
        load_adapter(loaded, folder)
    kind = IFSegSegmenter if baseline is None else CosineSegmenter
    return kind(loaded.to(device), processor, inference, untuned=untuned or baseline is not None)
