"""Post-processing of the model's outputs into label maps: smoothing over similar patches, resizing, argmax.

A model tuned on word maps alone has never seen an image, so the prediction for each patch is averaged with the
predictions for the patches whose image features are most similar (section 2.4 of the paper).
"""

from collections.abc import Iterator, Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, interpolate, normalize

from .dense_crf_ifseg import dense_crf

SMOOTHING_NEIGHBORS, SMOOTHING_ITERATIONS = 3, 25  # the paper's, for models that were tuned on word maps
NO_CATEGORY = -1  # of pixels below the threshold, as in transformers' instance segmentation

# Size of the largest temporary tensors (8 MiB of float32), which are rows of the similarity matrix or of an image.
_BLOCK = 2**21
_UNLIKELY = 0.05
_ROUNDING = 1e-6  # of probabilities, whose sum after resizing may be just below 1


def nearest_patches(features: Tensor, neighbors: int) -> Tensor:
    """
    Returns the most similar patches of each patch, the patch itself always among them.

    Args:
        features (`Tensor` of shape `(patches, channels)`): image features, any floating type.
        neighbors (`int`): how many, at least 1; an image with fewer patches returns all of them.

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
        # Written in place: results allocated between blocks would keep a block from reusing the last block's memory.
        indices = features.new_empty(patches, min(neighbors, patches), dtype=torch.int64)
        for start, nearest in zip(range(0, patches, rows), indices.split(rows), strict=True):
            similarity = features[start : start + rows] @ features.T
            # Larger than any cosine, so that the patch itself comes first among equal patches (a blank image).
            similarity.diagonal(start).fill_(2)
            nearest.copy_(similarity.topk(nearest.shape[1]).indices)
    return indices


def smooth_probabilities(
    probabilities: Tensor,
    features: Tensor,
    neighbors: int = SMOOTHING_NEIGHBORS,
    iterations: int = SMOOTHING_ITERATIONS,
) -> Tensor:
    """
    Smooths probabilities by repeating `p_i = mean of p_j over the neighbours j of patch i`.

    Args:
        probabilities (`Tensor` of shape `(patches, categories)`).
        features (`Tensor` of shape `(patches, channels)`): image features; neighbours have high cosine similarity.
        neighbors (`int`, defaults to 3): the most similar patches, the patch itself included.
        iterations (`int`, defaults to 25): 0 returns the probabilities unchanged.

    Returns:
        `Tensor` of shape `(patches, categories)`, float32.
    """
    probabilities = probabilities.float()
    if iterations == 0:
        return probabilities
    return _repeat_mean(probabilities, nearest_patches(features, neighbors), iterations)


def _repeat_mean(probabilities: Tensor, neighbors_of: Tensor, iterations: int) -> Tensor:
    """Replaces the probabilities of each patch by the mean over its neighbours (patches, neighbors), repeatedly."""
    # With 1D indices the offsets are made once, and an iteration is one kernel on a GPU instead of three.
    patches, neighbors = neighbors_of.shape
    indices, offsets = neighbors_of.flatten(), torch.arange(patches, device=neighbors_of.device) * neighbors
    for _ in range(iterations):
        probabilities = embedding_bag(indices, probabilities, offsets, mode="mean")
    return probabilities


def patch_scores(
    outputs, neighbors: int = SMOOTHING_NEIGHBORS, iterations: int = SMOOTHING_ITERATIONS
) -> Iterator[Tensor]:
    """
    Yields the scores of each image's patches: smoothed probabilities, or logits without smoothing.

    Args:
        outputs: the model's outputs, with `logits` `(batch, categories, h, w)`; `image_features`
            `(batch, channels, h, w)` unless `iterations` is 0; and `patch_mask` `(batch, h, w)` or `None`: true for the
            patches of the image, false for the padding at its right and bottom.
        neighbors, iterations (`int`): see [`smooth_probabilities`].

    Yields:
        For each image a `Tensor` of shape `(categories, h, w)`, float32, without padding: smoothed probabilities, or
        the logits if `iterations` is 0.
    """
    for (scores,) in smoothing_sweep(outputs, [(neighbors, iterations)]):
        yield scores


def smoothing_sweep(outputs, settings: Sequence[tuple[int, int]]) -> Iterator[list[Tensor]]:
    """
    Yields [`patch_scores`] for several pairs of neighbours and iterations, with one search for neighbours per image.

    Yields:
        For each image a list of `Tensor` of shape `(categories, h, w)`, one for each of the `settings`.
    """
    for _, iterations in settings:
        if iterations < 0:
            raise ValueError(f"smoothing_iterations={iterations}: give 0 for no smoothing, or more.")
    most = max((neighbors for neighbors, iterations in settings if iterations), default=0)
    mask = getattr(outputs, "patch_mask", None)
    if any(iterations for _, iterations in settings) and getattr(outputs, "image_features", None) is None:
        raise ValueError(
            "Smoothing compares patches by outputs.image_features, which word maps lack. Pass smoothing_iterations=0."
        )
    sizes = [outputs.logits.shape[2:]] * len(outputs.logits)
    if mask is not None:
        sizes = list(zip(mask.any(2).sum(1).tolist(), mask.any(1).sum(1).tolist(), strict=True))
    for index, (logits, (height, width)) in enumerate(zip(outputs.logits.float(), sizes, strict=True)):
        logits = logits[:, :height, :width]
        scores = {(neighbors, 0): logits.contiguous() for neighbors, iterations in settings if not iterations}
        if len(scores) < len(settings):
            patches = outputs.image_features[index, :, :height, :width].flatten(1).T
            neighbors_of = nearest_patches(patches, most)  # the most similar first
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
    """Resizes `(categories, h, w)` scores to `size` `(height, width)`, bilinearly (`align_corners=False`)."""
    # With the categories last in memory, this function and the argmax take half the time.
    scores = scores[None].contiguous(memory_format=torch.channels_last)
    return interpolate(scores, size=size, mode="bilinear", align_corners=False)[0]


def _linear_weights(size: int, new_size: int, scores: Tensor) -> Tensor:
    """Returns the weights of linear resizing from `size` to `new_size` values, a matrix `(new_size, size)`."""
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    basis = torch.eye(size, dtype=exact, device=scores.device)
    return interpolate(basis[None], size=new_size, mode="linear", align_corners=False)[0].T.to(scores)


def check_threshold(threshold: float | None) -> None:
    """Raises `ValueError` unless `threshold` is `None` or a probability."""
    if threshold is None:
        return
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r}: give a probability, from 0 to 1.")


def _candidates(scores: Tensor) -> Tensor:
    """
    Returns the indices of the categories, in order, that can have the largest score somewhere after resizing.

    A resized score lies between the smallest and the largest of four adjacent patches. A category is left out if its
    largest is everywhere below the smallest of another category. Of hundreds of categories few remain.

    Args:
        scores (`Tensor` of shape `(categories, h, w)`): finite.
    """
    largest, smallest = scores, scores
    for axis in (1, 2):
        count = scores.shape[axis] - 1
        if count:
            largest = torch.maximum(largest.narrow(axis, 0, count), largest.narrow(axis, 1, count))
            smallest = torch.minimum(smallest.narrow(axis, 0, count), smallest.narrow(axis, 1, count))
    reached = smallest.amax(0)
    rounding = 1e-5 * (1 + reached.abs())
    below = largest < reached - rounding  # false for NaN
    return (~below).flatten(1).any(1).nonzero()[:, 0]


def resized_argmax(
    scores: Tensor, size: tuple[int, int], threshold: float | None = None, probabilities: Tensor | None = None
) -> Tensor:
    """
    Returns `resize_scores(scores, size).argmax(0)`, in memory that does not grow with the number of categories.

    Bilinear resizing is a product with the weights of the rows and a product with the weights of the columns.

    Args:
        scores (`Tensor` of shape `(categories, h, w)`), size (`(height, width)`).
        threshold (`float`, *optional*): pixels whose category has a lower probability get -1.
        probabilities (`Tensor` of shape `(categories, h, w)`, *optional*): what `threshold` is compared with, resized
            in the same way. Default: `scores`.

    Returns:
        `Tensor` of shape `size`, int64; of equal scores the first category wins.
    """
    check_threshold(threshold)
    h, w = scores.shape[1:]
    to_rows, to_columns = _linear_weights(h, size[0], scores), _linear_weights(w, size[1], scores)
    # An absent category has the smallest possible logit: without clamping, sums would be infinite and products NaN.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min / 4)
    candidates = _candidates(scores)
    categories = len(candidates)
    lines = scores[candidates].permute(1, 2, 0).flatten(1)
    likely = None
    if threshold is not None and probabilities is not None:
        likely = probabilities[candidates].permute(1, 2, 0).flatten(1)
    labels = scores.new_empty(size, dtype=torch.int64)
    count = max(1, _BLOCK // (size[1] * categories))
    with torch.autocast(scores.device.type, enabled=False):
        for rows, block in zip(to_rows.split(count), labels.split(count), strict=True):
            resized = to_columns @ (rows @ lines).view(-1, w, categories)
            best = resized.max(-1)
            block.copy_(candidates[best.indices])
            if threshold is not None:
                values = best.values
                if likely is not None:
                    resized = to_columns @ (rows @ likely).view(-1, w, categories)
                    values = resized.gather(-1, best.indices[..., None])[..., 0]
                block[values < threshold - _ROUNDING] = NO_CATEGORY
    return labels


def patch_labels(scores: Tensor, size: tuple[int, int], smoothed: bool, threshold: float | None = None) -> Tensor:
    """
    Returns the label map of the scores of an image's patches, as [`patch_scores`] yields them.

    Args:
        scores (`Tensor` of shape `(categories, h, w)`), size (`(height, width)`).
        smoothed (`bool`): whether the scores are smoothed probabilities; otherwise they are logits.
        threshold (`float`, *optional*): pixels whose category has a lower probability get -1. The probability is that
            of the patches, smoothed or the softmax of the logits, resized bilinearly.

    Returns:
        `Tensor` of shape `size`, int64.
    """
    probabilities = None if smoothed or threshold is None else scores.softmax(0)
    return resized_argmax(scores, size, threshold, probabilities)


def segmentation_maps(
    outputs,
    target_sizes=None,
    neighbors: int = SMOOTHING_NEIGHBORS,
    iterations: int = SMOOTHING_ITERATIONS,
    with_scores: bool = False,
    images: Sequence[Tensor] | None = None,
    threshold: float | None = None,
) -> list:
    """
    Returns label maps: a category for every pixel of every image.

    Args:
        outputs: see [`patch_scores`].
        target_sizes (list of `(height, width)` or `Tensor` of shape `(batch, 2)`, *optional*): sizes of the label
            maps, usually the images' original sizes. Without it a map has one label per patch.
        neighbors, iterations (`int`): see [`smooth_probabilities`].
        with_scores (`bool`, defaults to `False`): return pairs of a label map and its scores.
        images (list of `Tensor` of shape `(height, width, 3)`, *optional*): RGB from 0 to 255, in the size of their
            label maps, which are then fitted to the images by [`dense_crf`].
        threshold (`float`, *optional*): pixels whose category has a lower probability get -1; see [`patch_labels`].
            With `images` it is compared with the probability after [`dense_crf`].

    Returns:
        `list` of `Tensor` of shape `(height, width)`, int64: indices of the categories; or of pairs of such a map and
        a `Tensor` of shape `(categories, height, width)`: the resized scores.
    """
    check_threshold(threshold)
    if target_sizes is not None:
        _check_sizes(target_sizes, len(outputs.logits))
    maps = []
    for index, scores in enumerate(patch_scores(outputs, neighbors, iterations)):
        height, width = scores.shape[1:] if target_sizes is None else map(int, target_sizes[index])
        if images is not None:
            fitted = _fit_to_image(scores if iterations else scores.softmax(0), images[index], (height, width))
            best = fitted.max(0)
            labels = best.indices
            if threshold is not None:
                labels[best.values < threshold - _ROUNDING] = NO_CATEGORY
            maps.append((labels, fitted) if with_scores else labels)
            continue
        labels = patch_labels(scores, (height, width), bool(iterations), threshold)
        maps.append((labels, resize_scores(scores, (height, width))) if with_scores else labels)
    return maps


def _check_sizes(target_sizes, images: int) -> None:
    """Raises `ValueError` unless there is a pair of positive integers for each image."""
    if len(target_sizes) != images:
        raise ValueError(f"{len(target_sizes)} target_sizes for {images} images: give one (height, width) per image.")
    for size in target_sizes:
        sides = size.tolist() if hasattr(size, "tolist") else size  # a tensor or an array
        pair = isinstance(sides, Sequence) and not isinstance(sides, str) and len(sides) == 2
        if not pair or any(not isinstance(side, Real) or side % 1 or side < 1 for side in sides):
            raise ValueError(f"target_sizes holds {sides}: give one (height, width) in pixels per image.")


def _fit_to_image(probabilities: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    """
    Returns the probabilities of pixels after [`dense_crf`], (categories, height, width).

    Categories whose probability is nowhere more than 5 % take no part, which saves time, and get 0.

    Args:
        probabilities (`Tensor` of shape `(categories, h, w)`): of patches.
        image (`Tensor` of shape `(height, width, 3)`), size (`(height, width)`).
    """
    likely = probabilities.amax((1, 2)) > _UNLIKELY
    if not likely.any():
        likely[:] = True
    fitted = dense_crf(resize_scores(probabilities[likely], size), image.to(probabilities.device))
    whole = fitted.new_zeros(len(probabilities), *size)
    whole[likely] = fitted
    return whole


__all__ = [
    "NO_CATEGORY",
    "SMOOTHING_ITERATIONS",
    "SMOOTHING_NEIGHBORS",
    "check_threshold",
    "nearest_patches",
    "patch_labels",
    "patch_scores",
    "resize_scores",
    "resized_argmax",
    "segmentation_maps",
    "smooth_probabilities",
    "smoothing_sweep",
]
