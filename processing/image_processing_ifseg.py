"""Image processor: images and segmentation maps to tensors, resized exactly as in the published implementation."""

import os

import numpy as np
from PIL import Image
from torch import Tensor, tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

from .image_reading_ifseg import read_image, to_array, upright
from .post_processing_ifseg import SMOOTHING_ITERATIONS, SMOOTHING_NEIGHBORS
from .post_processing_ifseg import segmentation_maps as maps_from_outputs

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100  # label of ignored pixels, as in torch's cross-entropy


def output_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """
    Returns height and width after the resize.

    `{"shortest_edge": s, "longest_edge": l}` keeps the ratio: the short side becomes `s` unless the long side
    would exceed `l`; one of the two keys is enough. `{"height": h, "width": w}` does not keep the ratio.
    """
    if any(side is not None and side < 1 for side in dict(size).values()):
        raise ValueError(f"size={dict(size)}: sides are at least 1.")
    if size.height and size.width:
        return size.height, size.width
    scales = []
    if size.shortest_edge:
        scales.append(size.shortest_edge / min(height, width))
    if size.longest_edge:
        scales.append(size.longest_edge / max(height, width))
    if not scales:
        raise ValueError(f"size={dict(size)}: give shortest_edge and/or longest_edge, or height and width.")
    scale = min(scales)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _source_pixels(target: int, source: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the source pixels of linear resizing along an axis, from length `source` to length `target`.

    For each target pixel: the indices of the two source pixels, not clamped, and the weight of the second, float32 as
    in OpenCV.
    """
    position = ((np.arange(target) + 0.5) * (1 / (target / source)) - 0.5).astype(np.float32)
    first = np.floor(position)
    return first.astype(np.int64), first.astype(np.int64) + 1, position - first


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """
    Resizes as OpenCV's `INTER_LINEAR`: bilinear without antialiasing; uint8 bit for bit, in OpenCV's integers.

    Args:
        image (`np.ndarray` of shape `(H, W, C)`, uint8 or float32).

    Returns:
        `np.ndarray` of shape `(height, width, C)`, of the image's type.
    """
    if image.shape[:2] == (height, width):
        return image
    left, right, weight_x = _source_pixels(width, image.shape[1])
    # As in OpenCV: beyond the left and right edges the weights become 1 and 0; beyond the top and bottom edges the rows
    # are clamped and the weights stay.
    weight_x = np.where((left < 0) | (right >= image.shape[1]), np.float32(0), weight_x)
    left, right = left.clip(0, image.shape[1] - 1), right.clip(0, image.shape[1] - 1)
    top, bottom, weight_y = _source_pixels(height, image.shape[0])
    top, bottom = top.clip(0, image.shape[0] - 1), bottom.clip(0, image.shape[0] - 1)

    weights: list[np.ndarray] = [1 - weight_x, weight_x, 1 - weight_y, weight_y]
    if image.dtype == np.uint8:  # fixed point with 11 bits
        weights = [np.rint(weight * np.float32(2048)).astype(np.int32) for weight in weights]
    x0, x1, y0, y1 = weights
    x0, x1, y0, y1 = x0[:, None], x1[:, None], y0[:, None, None], y1[:, None, None]

    resized = np.empty((height, width, image.shape[2]), image.dtype)
    for start in range(0, height, 32):  # in blocks that fit into the CPU's cache
        block = slice(start, start + 32)
        rows, inverse = np.unique(np.concatenate([top[block], bottom[block]]), return_inverse=True)
        source = image[rows].astype(x0.dtype)
        sums = np.take(source, left, axis=1) * x0 + np.take(source, right, axis=1) * x1
        if image.dtype == np.uint8:
            sums >>= 4
        upper, lower = np.split(inverse, 2)
        upper, lower = sums[upper] * y0[block], sums[lower] * y1[block]
        resized[block] = upper + lower if image.dtype != np.uint8 else ((upper >> 16) + (lower >> 16) + 2) >> 2
    return resized


def resize_bicubic(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes an image `(H, W, 3)`, uint8 or float32, to `(side, side, 3)` as Pillow does, with antialiasing."""
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
    channels = [Image.fromarray(image[..., channel]) for channel in range(image.shape[-1])]
    return np.stack([np.asarray(x.resize((side, side), Image.Resampling.BICUBIC)) for x in channels], axis=-1)


def resize_nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes `(H, W)` labels: each pixel takes the label under its centre."""
    rows, columns = (
        ((2 * np.arange(target) + 1) * source // (2 * target))
        for target, source in zip((height, width), labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


class IFSegImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether label 0 of a segmentation map means "no category" (ADE20K): 0 is ignored, all others are lowered by 1.
        As in transformers' SegFormer, 255 of an 8-bit map is then ignored as well.
    ignore_index (`int`, *optional*, defaults to `self.ignore_index`):
        A value in segmentation maps that marks pixels without a label; they become -100.
    """

    do_reduce_labels: bool
    ignore_index: int | None


class IFSegImageProcessor(PilBackend):
    r"""
    Turns images into `pixel_values` and `pixel_mask`, segmentation maps into `labels`, outputs into segmentation maps.

    Needs NumPy and Pillow only. Images are resized as by OpenCV (bilinear, without antialiasing), bit for bit, since
    the published results were computed with OpenCV.

    Args:
        do_resize (`bool`, defaults to `True`), size (`dict`, defaults to `{"shortest_edge": 512, "longest_edge":
            2048}`): the short side becomes 512 pixels unless the long side would exceed 2048; the ratio is kept.
        do_rescale (`bool`, defaults to `True`), rescale_factor (`float`, defaults to 1/255).
        do_normalize (`bool`, defaults to `True`), image_mean, image_std (default to 0.5 for each channel).
        do_pad (`bool`, defaults to `True`), pad_size (`dict`, *optional*): images are padded at the right and bottom
            with 0 to the largest height and width among them, or to `pad_size`.
        do_reduce_labels (`bool`, defaults to `False`), ignore_index (`int`, *optional*): see
            [`IFSegImageProcessorKwargs`].
        smoothing_neighbors (`int`, defaults to 3), smoothing_iterations (`int`, defaults to 25): defaults of
            [`~IFSegImageProcessor.post_process_semantic_segmentation`] and [`IFSegSegmenter`]. A model that was trained
            on images needs no smoothing: 0 iterations.
        generation_size (`int`, *optional*): side in pixels of the square images that the model writes text about; see
            [`~IFSegImageProcessor.square`]. Default: the shortest edge (or height and width) of `size`.
        sliding_window (`int`, *optional*): side in pixels of the crops that the model was trained on.
            [`IFSegSegmenter`] then segments images in such crops; by default it segments whole images.
    """

    _auto_class = "AutoImageProcessor"  # `save_pretrained` always saves the code, too
    valid_kwargs = IFSegImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]

    resample = PILImageResampling.BILINEAR
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 512, "longest_edge": 2048}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    do_pad = True
    do_reduce_labels = False
    ignore_index = None
    smoothing_neighbors = SMOOTHING_NEIGHBORS
    smoothing_iterations = SMOOTHING_ITERATIONS
    generation_size: int | None = None
    sliding_window: int | None = None

    def __init__(self, **kwargs: Unpack[IFSegImageProcessorKwargs]):
        super().__init__(**kwargs)

    @classmethod
    def for_ofa(cls, image_size: int, d_model: int) -> "IFSegImageProcessor":
        """Returns the image processor of a published OFA from the `image_size` and `d_model` of its configuration.

        OFA writes text about square images of 256 pixels a side (tiny, medium), 384 (base) or 480 (large, huge).
        """
        generation_size = 256 if d_model < 768 else 384 if d_model < 1024 else 480
        size = {"shortest_edge": image_size, "longest_edge": 4 * image_size}
        return cls(size=size, generation_size=min(generation_size, image_size))

    def square(self, images, input_data_format=None) -> list[np.ndarray]:
        """
        Returns images for text generation: squares with sides of `generation_size` pixels, resized bicubically.

        As in OFA, the ratio is not kept.

        Args:
            images, input_data_format: an image or a list of images, as for [`~IFSegImageProcessor.preprocess`].

        Returns:
            `list[np.ndarray]`: one array `(side, side, 3)` per image, uint8, or float32 if its values were.
        """
        sizes = (self.generation_size, self.size.get("shortest_edge"), self.size.get("height"))
        side = next((size for size in sizes if size), None)
        if side is None:
            raise ValueError(f"size={dict(self.size)}: set generation_size, the side of images to write text about.")
        return [
            resize_bicubic(to_array(image, input_data_format), side) for image in _flatten(self.fetch_images(images))
        ]

    def preprocess(self, images, segmentation_maps=None, **kwargs: Unpack[IFSegImageProcessorKwargs]) -> BatchFeature:
        """
        Args:
            images: an image or a list of images: PIL images, paths, URLs, arrays or tensors (see [`to_array`] for what
                they may hold), or one array or tensor of shape `(batch, ...)`.
            segmentation_maps (*optional*): one map per image, of the image's size: PIL images, paths, arrays or tensors
                of shape `(H, W)` with integer labels.
            return_tensors (`str`, *optional*): "pt" for torch tensors, "np" for NumPy arrays.
            **kwargs: any argument of the constructor, for this call.

        Returns:
            [`BatchFeature`] with

            - **pixel_values** (batch, 3, H, W), float32: normalised RGB.
            - **pixel_mask** (batch, H, W), int64: 1 inside the image, 0 in the padding. Always present, so that
              several results can be joined into one batch.
            - **labels** (batch, H, W), int64, with `segmentation_maps`: -100 is ignored, as in the padding.

        Raises:
            `ValueError` for an image that can't be read or has a wrong number of channels, and for a map whose size
            differs from its image's size.
        """
        for name in ("size", "pad_size"):
            sides = kwargs.get(name)
            if isinstance(sides, (list, tuple)) and len(sides) != 2:
                raise ValueError(f"{name}={sides!r}: give height and width.")
        return super().preprocess(images, segmentation_maps, **kwargs)

    def fetch_images(self, images):
        """Opens paths, URLs and base64 texts; returns images unchanged."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        return read_image(images) if isinstance(images, (str, os.PathLike)) else images

    def process_image(self, image, input_data_format=None, **kwargs) -> np.ndarray:
        """Returns an image of any kind as a `(3, H, W)` array; see [`to_array`]."""
        return to_array(image, input_data_format).transpose(2, 0, 1)

    def resize(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """Resizes a `(3, H, W)` array to the size that [`output_size`] returns."""
        height, width = output_size(image.shape[1], image.shape[2], size)
        return resize_bilinear(image.transpose(1, 2, 0), height, width).transpose(2, 0, 1)

    def _validate_preprocess_kwargs(self, **kwargs):
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs.get("resample") not in (None, PILImageResampling.BILINEAR):
            raise ValueError("IFSegImageProcessor resizes images bilinearly: leave out `resample`.")
        if kwargs.get("do_center_crop"):
            raise ValueError("IFSegImageProcessor doesn't crop: the model takes images of any size and ratio.")

    def _preprocess_image_like_inputs(
        self, images, segmentation_maps, input_data_format=None, return_tensors=None, **kwargs
    ) -> BatchFeature:
        images = [self.process_image(image, input_data_format) for image in _flatten(self.fetch_images(images))]
        if not images:
            raise ValueError("There is no image to process.")
        sizes = [image.shape[1:] for image in images]
        images = [self._preprocess_image(image, **kwargs) for image in images]
        labels = None
        if segmentation_maps is not None:
            labels = self._preprocess_maps(segmentation_maps, sizes, [image.shape[1:] for image in images], **kwargs)

        masks = [np.ones(image.shape[1:], np.int64) for image in images]
        if kwargs["do_pad"]:
            pad_size = kwargs["pad_size"]
            images, masks = self.pad(images, pad_size, return_mask=True)
            labels = labels and [
                padded[0] for padded in self.pad([label[None] for label in labels], pad_size, IGNORE_INDEX)
            ]
        data = {"pixel_values": images, "pixel_mask": masks} | ({"labels": labels} if labels else {})
        return BatchFeature(data, tensor_type=return_tensors)

    def _preprocess_image(
        self, image, do_resize, size, do_rescale, rescale_factor, do_normalize, image_mean, image_std, **kwargs
    ) -> np.ndarray:
        if do_resize:
            image = self.resize(image, size)
        if do_rescale and image.dtype != np.uint8 and image.max() <= 1:
            logger.warning_once(
                "An image with floating-point values from 0 to 1 is divided by 255 again. "
                "If that is not what you want, pass do_rescale=False."
            )
        image = np.ascontiguousarray(image, dtype=np.float32)
        if do_rescale:
            image = image * np.float32(rescale_factor)
        if do_normalize:
            mean, std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (image_mean, image_std))
            image = (image - mean) / std
        return image

    def _preprocess_maps(self, maps, sizes, new_sizes, do_reduce_labels, ignore_index, **kwargs) -> list[np.ndarray]:
        maps = [_to_labels(values) for values in _flatten(self.fetch_images(maps), dimensions=2)]
        if len(maps) != len(sizes):
            raise ValueError(f"{len(maps)} segmentation maps for {len(sizes)} images: give one map an image.")
        processed = []
        for index, (values, size, new_size) in enumerate(zip(maps, sizes, new_sizes, strict=True)):
            if values.shape != size:
                raise ValueError(
                    f"Segmentation map {index} is {values.shape} (height, width), but its image is {size}."
                )
            labels = values.astype(np.int64)
            ignored = labels == (IGNORE_INDEX if ignore_index is None else ignore_index)
            if do_reduce_labels:
                ignored |= (labels == 0) | ((labels == 255) & (values.dtype == np.uint8))
                labels = np.where(labels == IGNORE_INDEX, IGNORE_INDEX, labels - 1)
            labels[ignored] = IGNORE_INDEX
            processed.append(resize_nearest(labels, *new_size))
        return processed

    def smoothing(self, neighbors: int | None = None, iterations: int | None = None) -> tuple[int, int]:
        """Returns neighbours and iterations of the smoothing, with this processor's in place of `None`."""
        neighbors = self.smoothing_neighbors if neighbors is None else neighbors
        return neighbors, self.smoothing_iterations if iterations is None else iterations

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes=None,
        smoothing_neighbors: int | None = None,
        smoothing_iterations: int | None = None,
        return_segmentation_scores: bool = False,
        crf: bool = False,
        images=None,
        threshold: float | None = None,
    ) -> list[Tensor] | list[BatchFeature]:
        """
        Returns label maps: a category for every pixel.

        The probabilities of each patch are averaged with those of its `smoothing_neighbors` most similar patches, the
        patch itself included, `smoothing_iterations` times, and resized bilinearly; each pixel gets the most probable
        category. Without smoothing, as for a model trained on images, the logits are resized instead.

        Args:
            outputs ([`IFSegSegmentationOutput`]): the model's outputs for a batch of images.
            target_sizes (list of `(height, width)` or `Tensor` of shape `(batch, 2)`, *optional*): sizes of the
                label maps, usually the images' sizes before processing. Without it a map has one label per patch.
            smoothing_neighbors (`int`, *optional*), smoothing_iterations (`int`, *optional*): 0 iterations do not
                smooth. Default: this processor's `smoothing_neighbors` and `smoothing_iterations`.
            return_segmentation_scores (`bool`, defaults to `False`): return the scores of all categories as well.
            crf (`bool`, defaults to `False`): fit the label maps to the colours of the images by [`dense_crf`]. For
                pictures; the paper's results are without it.
            images (*optional*): for `crf`, the images before processing, with values from 0 to 255 and in the sizes of
                their label maps; an image or a list of images, as for [`preprocess`]. `target_sizes` are then those of
                the images by default.
            threshold (`float`, *optional*): a probability from 0 to 1; pixels whose category has a lower one belong to
                no category and get -1. Compared with what the label map is made of: the probability of the patches
                after smoothing (without smoothing, the softmax of their logits), resized, and with `crf` the
                probability after it. Default: every pixel gets a category.

        Returns:
            `list` of `Tensor` of shape `(height, width)`, int64: indices of the categories, one map per image. With
            the scores, `list` of [`BatchFeature`] with **segmentation**, such a map, and **segmentation_scores**
            (categories, height, width): probabilities, or logits without smoothing and `crf`.

        Raises:
            `ValueError` for `crf` without one image for each label map, or with images of other sizes, and for a
            `threshold` that is no probability.
        """
        neighbors, iterations = self.smoothing(smoothing_neighbors, smoothing_iterations)
        pixels = None
        if crf:
            found = [] if images is None else _flatten(self.fetch_images(images))
            pixels = [tensor(to_array(image)) for image in found]
            if len(pixels) != len(outputs.logits):
                raise ValueError(f"crf=True needs the images: {len(pixels)} for {len(outputs.logits)} label maps.")
            if target_sizes is None:
                target_sizes = [image.shape[:2] for image in pixels]
        maps = maps_from_outputs(
            outputs, target_sizes, neighbors, iterations, return_segmentation_scores, pixels, threshold
        )
        if not return_segmentation_scores:
            return maps
        return [BatchFeature({"segmentation": labels, "segmentation_scores": scores}) for labels, scores in maps]


def _flatten(images, dimensions: int = 3) -> list:
    """Returns a flat list of single images from a nested list, a batch (one more dimension) or one image."""
    if isinstance(images, (list, tuple)):
        return [single for image in images for single in _flatten(image, dimensions)]
    return list(images) if getattr(images, "ndim", 0) > dimensions else [images]


def _to_labels(values) -> np.ndarray:
    if isinstance(values, Image.Image):
        values = upright(values)
    elif isinstance(values, Tensor):
        values = values.cpu()
    values = np.asarray(values)
    if values.ndim != 2 or not (np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_):
        raise ValueError(
            "A segmentation map has shape (H, W) and integer labels; this one has shape "
            f"{values.shape} and type {values.dtype}."
        )
    return values


__all__ = ["IFSegImageProcessor", "IFSegImageProcessorKwargs"]
