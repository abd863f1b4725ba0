"""Images of any kind, from files, Pillow, NumPy or torch, as RGB arrays."""

import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, load_image


def read_image(source, timeout: float | None = None) -> Image.Image:
    """
    Opens an image without changing its mode, so that the conversion to RGB loses nothing.

    Args:
        source (`str` or `os.PathLike`): a file, a URL, or base64 text.
        timeout (`float`, *optional*): seconds to wait for a URL.

    Raises:
        `ValueError` with the source's name if it is missing, damaged or no image.
    """
    name = str(source) if len(str(source)) <= 200 else str(source)[:200] + "..."
    try:
        if not os.path.isfile(source):
            return load_image(str(source), timeout=timeout)
        image = Image.open(source)
        image.load()
        return image
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image that Pillow can read.") from error
    except Exception as error:  # a damaged file, a connection and a decoder raise errors of many kinds
        raise ValueError(f"Can't read the image {name}: {error}") from error


def to_array(image, input_data_format: str | ChannelDimension | None = None) -> np.ndarray:
    """
    Returns an image of any kind as an RGB array.

    Args:
        image: a PIL image of any mode (turned upright by its EXIF orientation; of an animation the current frame, which
            is the first one unless `seek` was called), or an array or tensor of shape `(H, W)`, `(H, W, C)` or
            `(C, H, W)` with C = 1, 3 or 4. 16-bit values become 8-bit values; transparent pixels are blended with
            white. Grey PIL images of 32 bits are scaled from the smallest range that holds their values: 0 to 1
            (floats only), 255 or 65535.
        input_data_format (`str`, *optional*): "channels_first" or "channels_last", for shapes that fit both.

    Returns:
        `np.ndarray` of shape `(H, W, 3)`, uint8, or float32 if the values of an array were floating-point.

    Raises:
        `ValueError`: the image cannot be read, has no pixels, or has values or channels that no image has.
    """
    if isinstance(image, Image.Image):
        image = upright(image)
        if 0 in image.size:
            raise ValueError(f"An image of {image.width} x {image.height} has no pixels.")
        if not image.mode.startswith(("I", "F")):
            return _pil_to_rgb(image)
        image = _scale_to_16_bits(np.asarray(image))
    elif isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    elif not isinstance(image, np.ndarray):
        raise TypeError(f"An image is a PIL image, a path, an array or a tensor, not {type(image).__name__}.")
    image = _to_channels_last(image, input_data_format)
    if 0 in image.shape:
        raise ValueError(f"An image of shape {image.shape} has no pixels.")
    return np.ascontiguousarray(_array_to_rgb(_to_uint8_or_float(image)))


def upright(image: Image.Image) -> Image.Image:
    """Returns a PIL image, read and turned upright by its EXIF orientation. Raises `ValueError`."""
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise many kinds of errors; a closed file an AssertionError without a text
        reason = str(error) or "its file was closed before it was read (call load() first)."
        raise ValueError(f"Can't read the image: {reason}") from error


def _scale_to_16_bits(image: np.ndarray) -> np.ndarray:
    """
    Returns the values of a PIL image of mode I;16, I or F as uint16, or as uint8 if they are those of 8 bits.

    Pillow's own conversion cuts values off at 255.
    """
    low, high = (image.min(), image.max()) if image.size else (0, 0)
    if not np.isfinite([low, high]).all():
        raise ValueError("The image holds values that are not finite.")
    if low < 0 or high > 65535:
        raise ValueError(
            f"The image holds values of {image.dtype} from {low} to {high}, whose range is unknown: scale them to 0 "
            "to 255 (8 bits) or 65535 (16 bits), or floats to 0 to 1."
        )
    if image.dtype.kind == "f" and high <= 1:
        return (image * 65535).round().astype(np.uint16)
    if image.dtype.itemsize > 2 and high <= 255:  # mode "I" may hold 8 or 16 bits in 32
        return image.round().astype(np.uint8)
    return image.round().astype(np.uint16)


# transformers' `convert_to_rgb` is not used here: up to version 5.17 it drops transparency and does not convert arrays.


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    """Returns a PIL image of any mode as a uint8 array (H, W, 3), blended with white where it is transparent."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def _array_to_rgb(image: np.ndarray) -> np.ndarray:
    """Returns (H, W, C), uint8 or float with values in [0, 1], as (H, W, 3): grey repeated, RGBA blended with white."""
    if image.shape[-1] == 1:
        return image.repeat(3, axis=-1)
    if image.shape[-1] == 3:
        return image
    if image.dtype != np.uint8 and (image.min() < 0 or image.max() > 1):
        raise ValueError(
            f"A transparent image of floats has values from 0 to 1, not from {image.min()} to {image.max()}."
        )
    white = 255 if image.dtype == np.uint8 else 1.0
    alpha = image[..., 3:] / white
    blended = alpha * image[..., :3] + (1 - alpha) * white
    return (blended.round() if white == 255 else blended).astype(image.dtype)


def _to_channels_last(image: np.ndarray, input_data_format) -> np.ndarray:
    if image.ndim == 2:
        return image[..., None]
    if image.ndim != 3:
        raise ValueError(f"An image has 2 or 3 dimensions, not {image.ndim} (shape {image.shape}).")
    if input_data_format is None:
        try:
            input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        except ValueError:
            input_data_format = "none"
    if input_data_format != "none" and ChannelDimension(input_data_format) == ChannelDimension.FIRST:
        image = np.moveaxis(image, 0, -1)
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"Wrong number of channels in an image of shape {image.shape}: it should be (H, W, C) or (C, H, W) with "
            "C = 1 (greyscale), 3 (RGB) or 4 (RGBA)."
        )
    return image


def _to_uint8_or_float(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * 255
    if image.dtype.kind == "u" and image.dtype.itemsize == 2:  # of either byte order
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if np.issubdtype(image.dtype, np.floating):
        if not np.isfinite(image).all():
            raise ValueError("The image holds values that are not finite.")
        return image.astype(np.float32)
    if np.issubdtype(image.dtype, np.integer) and image.min() >= 0 and image.max() <= 255:
        return image.astype(np.uint8)
    raise ValueError(f"An image of {image.dtype} should hold values from 0 to 255.")


__all__ = ["read_image", "to_array", "upright"]
