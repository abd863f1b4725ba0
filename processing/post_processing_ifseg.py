"""From the model's output to a label for every pixel: smoothing over similar patches, resizing, argmax.

Section 2.4 of the paper: a model tuned on word maps alone has never seen a photo, so its prediction for a patch is
averaged with those for the patches that look alike in the trunk's features.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, interpolate, normalize

# Entries of the largest temporary tensor (8 MiB of float32): rows of the similarity matrix, of the resized photo.
_BLOCK = 2**21


def nearest_patches(features: Tensor, neighbors: int) -> Tensor:
    """
    The patches that look most like each patch, itself always among them.

    Args:
        features (`Tensor` of shape `(patches, channels)`): image features, any floating type.
        neighbors (`int`): how many, at least 1; a photo of fewer patches has that many.

    Returns:
        `Tensor` of shape `(patches, neighbors)`, int64: indices of the patches of highest cosine similarity.
    """
    if neighbors < 1:
        raise ValueError(
            f"smoothing_neighbors={neighbors}: a patch is its own first neighbour, so it must be 1 or more."
        )
    patches = features.shape[0]
    # Under autocast the similarities would be rounded to half precision, and neighbours swapped.
    with torch.autocast(features.device.type, enabled=False):
        features = normalize(features.float().contiguous(), dim=-1)
        rows = max(1, _BLOCK // patches)
        # Filled, not collected: small tensors between the blocks would keep each from taking the last one's memory.
        indices = features.new_empty(patches, min(neighbors, patches), dtype=torch.int64)
        for start, nearest in zip(range(0, patches, rows), indices.split(rows), strict=True):
            similarity = features[start : start + rows] @ features.T
            # Above any cosine: of patches that are exactly alike (a blank photo) the patch itself comes first.
            similarity.diagonal(start).fill_(2)
            nearest.copy_(similarity.topk(nearest.shape[1]).indices)
    return indices


def smooth_probabilities(probabilities: Tensor, features: Tensor, neighbors: int = 3, iterations: int = 25) -> Tensor:
    """
    Repeats `p_i = mean of p_j over the neighbours j of patch i`.

    Args:
        probabilities (`Tensor` of shape `(patches, categories)`).
        features (`Tensor` of shape `(patches, channels)`): what the patches are compared by.
        neighbors (`int`, defaults to 3): the most similar patches, the patch itself included.
        iterations (`int`, defaults to 25): 0 returns the probabilities as they are.

    Returns:
        `Tensor` of shape `(patches, categories)`, float32.
    """
    probabilities = probabilities.float()
    if iterations == 0:
        return probabilities
    return _repeat_mean(probabilities, nearest_patches(features, neighbors), iterations)


def _repeat_mean(probabilities: Tensor, neighbors_of: Tensor, iterations: int) -> Tensor:
    """`smooth_probabilities` over the neighbours (patches, neighbors) of every patch."""
    for _ in range(iterations):
        probabilities = embedding_bag(neighbors_of, probabilities, mode="mean")
    return probabilities


def patch_scores(outputs, neighbors: int = 3, iterations: int = 25) -> Iterator[Tensor]:
    """
    What the categories of each photo are compared by, patch by patch.

    Args:
        outputs: what the model returned, with `logits` `(batch, categories, h, w)`; `image_features`
            `(batch, channels, h, w)` unless `iterations` is 0; and `patch_mask` `(batch, h, w)` or `None`: the patches
            that belong to the photo (the rest, at its right and bottom, pads it to the size of its neighbours).
        neighbors, iterations (`int`): see [`smooth_probabilities`].

    Yields:
        For each photo a `Tensor` of shape `(categories, h, w)`, float32, without padding: smoothed probabilities, or
        the logits when `iterations` is 0.
    """
    for (scores,) in smoothing_sweep(outputs, [(neighbors, iterations)]):
        yield scores


def smoothing_sweep(outputs, settings: Sequence[tuple[int, int]]) -> Iterator[list[Tensor]]:
    """
    [`patch_scores`] for several pairs of neighbours and iterations, which share the search for neighbours.

    Yields:
        For each photo a list of `Tensor` of shape `(categories, h, w)`, one for each of the `settings`.
    """
    for _, iterations in settings:
        if iterations < 0:
            raise ValueError(f"smoothing_iterations={iterations}: give 0 for no smoothing, or more.")
    most = max((neighbors for neighbors, iterations in settings if iterations), default=0)
    mask = getattr(outputs, "patch_mask", None)
    if any(iterations for _, iterations in settings) and getattr(outputs, "image_features", None) is None:
        raise ValueError(
            "Smoothing compares patches by outputs.image_features, which are missing: a word map has none. "
            "Pass smoothing_iterations=0."
        )
    for index, logits in enumerate(outputs.logits.float()):
        height, width = logits.shape[1:]
        if mask is not None:
            height, width = int(mask[index].any(1).sum()), int(mask[index].any(0).sum())
            logits = logits[:, :height, :width]
        scores = {(neighbors, 0): logits.contiguous() for neighbors, iterations in settings if not iterations}
        if len(scores) < len(settings):
            patches = outputs.image_features[index, :, :height, :width].flatten(1).T
            neighbors_of = nearest_patches(patches, most)  # the most alike first
            done, probabilities = (0, 0), None
            for neighbors, iterations in sorted(setting for setting in set(settings) if setting[1]):
                if neighbors != done[0]:
                    done, probabilities = (neighbors, 0), logits.softmax(0).flatten(1).T
                some = neighbors_of[:, :neighbors].contiguous()
                probabilities = _repeat_mean(probabilities, some, iterations - done[1])
                done = neighbors, iterations
                scores[done] = probabilities.T.unflatten(1, (height, width)).contiguous()
        yield [scores[setting] for setting in settings]


def resize_scores(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """`(categories, h, w)` scores at `size` `(height, width)`, bilinearly (`align_corners=False`)."""
    # with a pixel's categories side by side in memory: half the time, and half for the argmax over them
    scores = scores[None].contiguous(memory_format=torch.channels_last)
    return interpolate(scores, size=size, mode="bilinear", align_corners=False)[0]


def _linear_weights(size: int, new_size: int, scores: Tensor) -> Tensor:
    """What each of `size` places counts for at each of `new_size`, `(new_size, size)`, as `interpolate` has it."""
    basis = torch.eye(size, dtype=torch.float64, device="cpu")
    return interpolate(basis[None], size=new_size, mode="linear", align_corners=False)[0].T.to(scores)


def resized_argmax(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """
    `resize_scores(scores, size).argmax(0)`, in memory that does not grow with the number of categories.

    Bilinear resizing is a product with the weights of the rows and one with those of the columns.

    Args:
        scores (`Tensor` of shape `(categories, h, w)`), size (`(height, width)`).

    Returns:
        `Tensor` of shape `size`, int64; of equal scores the first category wins.
    """
    categories, h, w = scores.shape
    to_rows, to_columns = _linear_weights(h, size[0], scores), _linear_weights(w, size[1], scores)
    # an absent category has the smallest logit there is; a sum of it must not become infinite, zero times that is none
    lines = scores.permute(1, 2, 0).flatten(1).clamp(min=torch.finfo(scores.dtype).min / 4)
    labels = scores.new_empty(size, dtype=torch.int64)
    count = max(1, _BLOCK // (size[1] * categories))
    with torch.autocast(scores.device.type, enabled=False):
        for rows, block in zip(to_rows.split(count), labels.split(count), strict=True):
            resized = to_columns @ (rows @ lines).view(-1, w, categories)
            block.copy_(resized.max(-1).indices)
    return labels


def segmentation_maps(
    outputs, target_sizes=None, neighbors: int = 3, iterations: int = 25, with_scores: bool = False
) -> list:
    """
    A category for every pixel of every photo.

    Args:
        outputs: see [`patch_scores`].
        target_sizes (list of `(height, width)` or `Tensor` of shape `(batch, 2)`, *optional*): the sizes wanted, one a
            photo, usually the original ones. Without it a map has one label a patch.
        neighbors, iterations (`int`): see [`smooth_probabilities`].
        with_scores (`bool`, defaults to `False`): return pairs of a map and its scores.

    Returns:
        `list` of `Tensor` of shape `(height, width)`, int64: indices of the categories; or of pairs of such a map and
        a `Tensor` of shape `(categories, height, width)`: what the categories were compared by.
    """
    if target_sizes is not None and len(target_sizes) != len(outputs.logits):
        raise ValueError(
            f"{len(target_sizes)} target_sizes for {len(outputs.logits)} photos: give one (height, width) a photo."
        )
    maps = []
    for index, scores in enumerate(patch_scores(outputs, neighbors, iterations)):
        height, width = scores.shape[1:] if target_sizes is None else map(int, target_sizes[index])
        labels = resized_argmax(scores, (height, width))
        maps.append((labels, resize_scores(scores, (height, width))) if with_scores else labels)
    return maps


__all__ = [
    "nearest_patches",
    "patch_scores",
    "resize_scores",
    "resized_argmax",
    "segmentation_maps",
    "smooth_probabilities",
    "smoothing_sweep",
]
