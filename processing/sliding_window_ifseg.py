"""Inference in overlapping square crops, for models that were trained on crops of images."""

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils import ModelOutput


def window_starts(patches: int, window: int, stride: int) -> list[int]:
    """Returns the starts of windows of `window` patches that cover `patches`: every `stride`, the last at the end."""
    last = max(0, patches - window)
    return [*range(0, last, stride), last]


@torch.no_grad()
def sliding_window_outputs(
    model,
    pixel_values: Tensor,
    pixel_mask: Tensor | None = None,
    crop: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    **words: Tensor,
) -> ModelOutput:
    """
    Returns the model's outputs for every patch, averaged over the square crops that contain the patch.

    Crops begin at patch boundaries, and the last crop of a row or column ends at the image's edge. Every patch is thus
    covered, and the outputs have the same shapes as for whole images. An image smaller than a crop is a single crop.

    Args:
        model ([`IFSegForSemanticSegmentation`]): in evaluation mode.
        pixel_values (`Tensor` of shape `(batch, 3, H, W)`), pixel_mask (`Tensor` of shape `(batch, H, W)`,
            *optional*): as the model takes them.
        crop (`int`, *optional*): side in pixels, a multiple of the model's patches. Default: `config.image_size`.
        stride (`int`, *optional*): pixels from crop to crop, rounded down to whole patches. Default: two thirds of
            `crop`, so that neighbouring crops overlap by a third.
        batch_size (`int`, defaults to 8): crops in one batch.
        **words: `input_ids`, `attention_mask`, `category_ids`, `category_mask` in place of the model's own words;
            the same for all images (a first dimension of 1).

    Returns:
        [`ModelOutput`] with **logits** (batch, categories, h, w), **image_features** (batch, channels, h, w), both
        float32, and **patch_mask** (batch, h, w), bool: the argument of
        [`IFSegImageProcessor.post_process_semantic_segmentation`].

    Raises:
        `ValueError` for a crop or stride out of range, or different words for each image.
    """
    patch = model.config.patch_size
    crop = model.config.image_size if crop is None else crop
    stride = 2 * crop // 3 if stride is None else stride
    if crop < patch or crop % patch:
        raise ValueError(f"crop={crop}: must be a multiple of the model's patches of {patch} pixels.")
    if not patch <= stride <= crop:
        raise ValueError(f"stride={stride}: must be from {patch}, one patch, to crop={crop}.")
    if any(len(tensor) != 1 for tensor in words.values()):
        raise ValueError("Crops take the same words for all images: pass tensors with a first dimension of 1.")
    outputs = []
    for index, image in enumerate(pixel_values):
        if pixel_mask is not None:  # without the padding at the right and bottom
            image = image[:, : pixel_mask[index].any(1).sum(), : pixel_mask[index].any(0).sum()]
        outputs.append(_average_over_windows(model, image, crop // patch, stride // patch, batch_size, words))
    height, width = (max(logits.shape[axis] for logits, _ in outputs) for axis in (1, 2))

    def joined(tensors) -> Tensor:
        return torch.stack([pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in tensors])

    logits, features = zip(*outputs, strict=True)
    inside = joined([torch.ones_like(x[0], dtype=torch.bool) for x in logits])
    return ModelOutput(logits=joined(logits), image_features=joined(features), patch_mask=inside)


def _average_over_windows(
    model, image: Tensor, window: int, stride: int, batch_size: int, words: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns logits (categories, h, w) and image features (channels, h, w) of an image (3, H, W).

    `window` and `stride` are in patches.
    """
    patch = model.config.patch_size
    height, width = (-(-side // patch) for side in image.shape[1:])
    corners = [(y, x) for y in window_starts(height, window, stride) for x in window_starts(width, window, stride)]
    count = torch.zeros(height, width, device=image.device)
    for y, x in corners:
        count[y : y + window, x : x + window] += 1
    sums: list[Tensor] = []
    for start in range(0, len(corners), batch_size):
        some = corners[start : start + batch_size]
        outputs = model(**_crops(image, some, window * patch, patch), **words)
        for row, (y, x) in enumerate(some):
            place = count[y : y + window, x : x + window]  # smaller than a window if the image is
            found = [outputs.logits[row].float(), outputs.image_features[row].float()]
            if not sums:
                sums = [tensor.new_zeros(len(tensor), height, width) for tensor in found]
            for total, tensor in zip(sums, found, strict=True):
                area = total[:, y : y + window, x : x + window]
                # Divided before the sum, because sums of an absent category's logits (the smallest float) overflow.
                area += tensor[:, : place.shape[0], : place.shape[1]] / place
    return sums[0], sums[1]


def _crops(image: Tensor, corners: list[tuple[int, int]], side: int, patch: int) -> dict[str, Tensor]:
    """Returns a batch of crops; crops that the image's edge cuts off are padded."""
    crops = [image[:, y * patch : y * patch + side, x * patch : x * patch + side] for y, x in corners]
    height, width = (max(crop.shape[axis] for crop in crops) for axis in (1, 2))
    margins = [(0, width - crop.shape[2], 0, height - crop.shape[1]) for crop in crops]
    inside = [torch.ones(crop.shape[1:], dtype=torch.long, device=image.device) for crop in crops]
    return {
        "pixel_values": torch.stack([pad(crop, margin) for crop, margin in zip(crops, margins, strict=True)]),
        "pixel_mask": torch.stack([pad(mask, margin) for mask, margin in zip(inside, margins, strict=True)]),
    }


__all__ = ["sliding_window_outputs", "window_starts"]
